"""Tables and plots of a result of `run`, `frame` or `bench.bench_gpu`: markdown beside it, SVG there or in --plots.

    python -m bench report                                   # bench/results/cpu_run.json
    python -m bench report small.json --plots docs
    python -m bench report bench/results/h200_scan.json      # of bench.bench_gpu: shares of the bound, a roofline
    python -m bench report bench/results/gpu_frame.json      # of bench frame: where a frame's microseconds go

Latency per frame against frames seen, and time against tokens, each with the 5th and 95th percentile; the fastest of a
column is bold, whoever it is; what was not measured is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import frame_report, roofline
from bench.svg import Line, chart

DEFAULT = Path(__file__).parent / "results" / "cpu_run.json"
SPREAD = "(median, 5th to 95th percentile)"
PARTS = {  # part -> heading, what a mark is, title of the plot, axes
    "frames": ("One more frame", "frame", "Time to read one more frame", "frames seen", f"ms a frame {SPREAD}"),
    "tokens": (
        "The core of a causal layer", "tokens", "Scan and attention alone", "tokens of one sequence", f"ms {SPREAD}",
    ),
    "blocks": ("A spatial and a temporal block", "clips", "Two blocks, forward", "clips of 16 frames", f"ms {SPREAD}"),
    "clips": ("Whole models on clips", "clips", "Answers for clips", "clips of 16 frames", f"ms {SPREAD}"),
    "training": (
        "Forward and backward", "clips", "A training step without its optimizer", "clips of 16 frames", f"ms {SPREAD}",
    ),
}  # fmt: skip
OURS = ("EndoMamba, triton", "EndoMamba, cpu", "scan, triton", "scan, cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT, metavar="FILE", help="what `run` wrote")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where the SVG files go; default: beside FILE")


def main(args: argparse.Namespace) -> int:
    try:
        result = json.loads(args.file.read_text())
        rows, meta = result["rows"], result["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"report: {args.file} is not a result of `python -m bench run`: {type(error).__name__}: {error}"
        print(told, file=sys.stderr)
        return 2
    if not rows:
        print(f"report: {args.file} has no rows: nothing was measured", file=sys.stderr)
        return 2
    if frame_report.is_one(result):
        out = args.file.with_suffix(".md")
        out.write_text(frame_report.table(args.file.name, result))
        print(f"written to {out}")
        return 0
    folder = args.plots or args.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    if roofline.is_one(result):
        written = {args.file.with_suffix(".md"): roofline.table(result)}
        written[folder / f"{args.file.stem}_roofline.svg"] = roofline.plot(result)
        for path, text in written.items():
            path.write_text(text)
            print(f"written to {path}")
        return 0
    for part in parts_of(result):
        plot = folder / f"{args.file.stem}_{part}.svg"
        plot.write_text(plotted(part, rows, meta))
        print(f"written to {plot}")
    out = args.file.with_suffix(".md")
    out.write_text(tables(args.file.name, result) + "\n")
    print(f"written to {out}")
    return 0


# ---- tables ------------------------------------------------------------------------------------------------------


def tables(name: str, result: dict) -> str:
    """All of a result but the plots, as markdown."""
    return "\n\n".join([head(name, result), *(section(part, result) for part in parts_of(result))])


def parts_of(result: dict) -> list[str]:
    return [part for part in PARTS if any(row["part"] == part for row in result["rows"])]


def head(name: str, result: dict) -> str:
    meta = result["meta"]
    loads = [row["load"] for row in result["rows"]]
    versions = ", ".join(f"{key} {value}" for key, value in meta["versions"].items())
    commands = "\n".join(result["commands"])
    return (
        f"# {name}\n\n{machine(meta)}; {versions}; commit {meta['commit'][:12]}{meta['commit'][40:]}; "
        f"load of the machine {min(loads)} to {max(loads)} (of it about {meta['threads']} is this benchmark's).\n\n"
        f"```\n{commands}\npython -m bench report\n```"
    )


def machine(meta: dict) -> str:
    """Model, frame and device in words."""
    device = meta["device"]
    name = device.get("name") or f"{device['cpu']}, {device['cores']} cores"
    layers = "" if meta["depth"] is None else f", {meta['depth']} layers"
    threads = "1 thread" if meta["threads"] == 1 else f"{meta['threads']} threads"
    return f"{meta['model']} models{layers}, frames of {meta['size']} pixels, {meta['dtype']}, {threads} on {name}"


def section(part: str, result: dict) -> str:
    heading, mark, *_ = PARTS[part]
    rows = [row for row in result["rows"] if row["part"] == part]
    times = table(mark, "ms", rows, lambda row: row["ms"]["median"], timed, best=True)
    parts = [f"## {heading}", times]
    if any(row["state_bytes"] for row in rows):
        parts.append(
            table(mark, "bytes carried", rows, lambda row: row["state_bytes"], lambda row: f"{row['state_bytes']:,}")
        )
    parts.append(
        table(mark, "peak bytes of a call", rows, lambda row: row["peak_bytes"], lambda row: f"{row['peak_bytes']:,}")
    )
    parts.append(facts(rows))
    missing = [m for m in result["missing"] if m["part"] == part]
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(not_measured(mark, m) for m in missing))
    return "\n\n".join(parts)


def not_measured(mark: str, missing: dict) -> str:
    at = f" at {mark} {missing['mark']:,}" if "mark" in missing else ""
    return f"- {missing['provider']}{at}: {missing['why']}"


def timed(row: dict) -> str:
    ms = row["ms"]
    return f"{short(ms['median'])} [{short(ms['p5'])}, {short(ms['p95'])}]"


def short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def table(mark: str, what: str, rows: list[dict], value, tell, best: bool = False) -> str:
    """A line for each provider, a column for each mark; best: the smallest value of a column is bold."""
    marks = sorted({row["mark"] for row in rows})
    cells = {(row["provider"], row["mark"]): row for row in rows}
    smallest = {m: min(value(row) for row in rows if row["mark"] == m) for m in marks}
    lines = [f"| {what} | " + " | ".join(f"{mark} {m:,}" for m in marks) + " |", "|---" + "|---:" * len(marks) + "|"]
    for name in dict.fromkeys(row["provider"] for row in rows):
        words = []
        for m in marks:
            row = cells.get((name, m))
            said = "–" if row is None else tell(row)
            words.append(f"**{said}**" if best and row and value(row) == smallest[m] else said)
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def facts(rows: list[dict]) -> str:
    """What hardly depends on the mark, at the last one; on a CPU the host's time is the time itself."""
    last = {row["provider"]: row for row in sorted(rows, key=lambda row: row["mark"])}
    columns = {
        "launches": lambda row: f"{row['launches']}",
        "ms of the host": lambda row: short(row["host"]["median"]),
        "calls": lambda row: f"{row['ms']['calls']}",
        "relative error": lambda row: f"{row['error']:.0e}",
    }
    if all(row["host"] == row["ms"] for row in rows):
        del columns["ms of the host"]
    lines = ["| at the last mark | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name in dict.fromkeys(row["provider"] for row in rows):
        lines.append(f"| {name} | " + " | ".join(tell(last[name]) for tell in columns.values()) + " |")
    return "\n".join(lines)


# ---- plots -------------------------------------------------------------------------------------------------------


def plotted(part: str, rows: list[dict], meta: dict) -> str:
    _, _, title, x_name, y_name = PARTS[part]
    rows = sorted((row for row in rows if row["part"] == part), key=lambda row: row["mark"])
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        spread = [(row["mark"], row["ms"]) for row in rows if row["provider"] == name]
        points = [(mark, ms["median"], ms["p5"], ms["p95"]) for mark, ms in spread]
        lines.append(Line(name, points, bold=name in OURS))
    return chart(title, machine(meta), x_name, y_name, lines, sorted({row["mark"] for row in rows}))
