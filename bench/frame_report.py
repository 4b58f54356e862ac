"""Of a result of `python -m bench frame`: every case, and where the microseconds of a frame go, beside their bound."""

from __future__ import annotations

import math
import re

from bench.chip import COPY, EX2, GPU

KEY = ("model", "dtype", "backend")


def is_one(result: dict) -> bool:
    return any("budget" in row for row in result["rows"])


def table(name: str, result: dict) -> str:
    meta = result["meta"]
    device = meta["device"].get("name") or meta["device"]["cpu"]
    versions = ", ".join(f"{key} {value}" for key, value in meta["versions"].items())
    parts = [
        f"# A stream's frames on {device}",
        f"{versions}; commit {meta['commit'][:12]}{meta['commit'][40:]}.",
        "```\n" + "\n".join(result["commands"]) + f"\npython -m bench report {name}\n```",
    ]
    for key in dict.fromkeys(tuple(row[k] for k in KEY) for row in result["rows"]):
        rows = [row for row in result["rows"] if tuple(row[k] for k in KEY) == key]
        parts.append(f"## {key[0]}, {key[1]}" + ("" if key[2] == "auto" else f", {key[2]}"))
        parts += [part for part in (latencies(rows), films(rows), drifts(rows), budget(rows, device)) if part]
    if result["missing"]:
        told = (f"- {m['case']} ({m['model']}, {m['dtype']}): {m['why']}" for m in result["missing"])
        parts.append("Not measured:\n\n" + "\n".join(told))
    return "\n\n".join(parts) + "\n"


def lines(columns: list[str], cells: list[list[str]]) -> str:
    """A markdown table, its first column to the left; empty without rows."""
    if not cells:
        return ""
    head = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in cells])


def latencies(rows: list[dict]) -> str:
    columns = ["ms, by the host's clock", "median", "p99 / p50", "p99.9", "max", "frames", "device's median"]
    columns += ["frames/s", "kernels", "bytes grown", "relative error"]
    return lines(columns, [latency(row) for row in rows if "host" in row])


def latency(row: dict) -> list[str]:
    host, device = row["host"], row["device"]
    times = [f"{host['median']:.3f}", f"{host['p99/p50']:.2f}", f"{host['p99.9']:.3f}", f"{host['max']:.3f}"]
    return [
        row["case"], *times, f"{host['frames']:,}", f"{device['median']:.3f}" if device else "–",
        f"{row['frames_per_second']:,.0f}", f"{row['launches']}", f"{row['bytes_grown']:,}", f"{row['error']:.0e}",
    ]  # fmt: skip


def films(rows: list[dict]) -> str:
    columns = ["frames a second", "from the mp4 to lines", "decoder alone", "model alone", "decoder waited"]
    cells = [
        [
            row["case"], f"{row['frames_per_second']:,.0f}", f"{row['decode_frames_per_second']:,.0f}",
            f"{row['model_frames_per_second']:,.0f}", f"{row['decoder_waited']:.0%}", row["limit"],
        ]
        for row in rows if "limit" in row
    ]  # fmt: skip
    return lines([*columns, "limited by the"], cells)


def drifts(rows: list[dict]) -> str:
    columns = ["error of the answers", "mean", "slope in 1,000 frames", "95 % interval", "first to last tenth"]
    cells = []
    for row in rows:
        if "by_time" in row:
            first, last = row["by_time"][0], row["by_time"][-1]
            tenths = f"{first:.2e} to {last:.2e}"
            cells.append([row["case"], f"{row['mean_error']:.2e}", *slope(row), tenths])
            other = row["restarted"]
            name = f"by how much more than a stream restarted every {other['every']} frames"
            mean = f"{row['mean_error'] - other['mean_error']:.2e}"
            cells.append([name, mean, *slope(row["beside_restarted"]), ""])
    return lines(columns, cells)


def slope(found: dict) -> list[str]:
    low, high = found["interval_per_1000_frames"]
    return [f"{found['slope_per_1000_frames']:+.1e}", f"{low:+.1e} to {high:+.1e}"]


def budget(rows: list[dict], device: str) -> str:
    """Of the case `resident N`."""
    row = next((row for row in rows if re.fullmatch(r"resident \d+", row["case"])), None)
    if row is None or not row["device"]:
        return ""
    total = sum(part["us"] for part in row["budget"])
    found = sorted(row["budget"], key=lambda part: -part["us"])
    cells = [
        [short(part["name"]), f"{part['count']}", f"{part['us']:.1f}", f"{part['us'] / part['count']:.2f}"]
        for part in found
    ]
    said = (
        f"Where a frame of `{row['case']}` goes: kernels of one frame in a profile, {total:.0f} us in sum. They may "
        f"overlap; without a profiler the frame takes {1e3 * row['device']['median']:.0f} us by events, "
        f"{1e3 * row['host']['median']:.0f} us of the host."
    )
    return f"{said}{bound(row, device)}\n\n" + lines(["kernel", "launches", "us", "us a launch"], cells)


def bound(row: dict, device: str) -> str:
    """What it cannot do without, on the chip whose rates are known."""
    if GPU not in device:
        return ""
    weights, exponentials = needed(row["model"], row["dtype"], int(row["case"].split()[-1]))
    return (
        f" Its bound: {1e6 * weights / COPY:.0f} us to read {weights / 1e6:.0f} MB of weights once, "
        f"{1e6 * exponentials / EX2:.0f} us for {exponentials / 1e6:.0f} million exponentials of the scans."
    )


def needed(name: str, dtype: str, size: int) -> tuple[int, int]:
    """-> bytes of the weights, exponentials of the scans of one frame."""
    import torch

    from endomamba.models import create_model

    with torch.device("meta"):
        model = create_model(f"endomamba_{name}", num_classes=7, img_size=size)
    config, each = model.config, {"bf16": 2, "fp32": 4}[dtype]
    walks = 2 * config.spatial_layers + config.temporal_layers
    tokens = config.with_cls_token + math.prod(config.grid)
    exponentials = walks * tokens * config.inner_dim * config.d_state
    return each * sum(p.numel() for p in model.parameters()), exponentials


def short(name: str) -> str:
    """A kernel's own name, without what it returns, its arguments and those of its template."""
    name = name.replace("(anonymous namespace)::", "")
    return re.sub(r"^(void|std::enable_if<.*?>::type) ", "", name).split("<")[0].split("(")[0].strip() or name
