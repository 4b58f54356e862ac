"""Of a result of `python -m bench.bench_gpu`: every scan beside the bound that applies, as a table and as a roofline.

The roofline counts state updates (one channel, one state, one token): what a byte moved gives, and what a second does.
Its roofs are the measured copy rate, the measured rate of exponentials (one an update, forward), and instruction issue
(backward), all of an H200: bench/chip.py.
"""

from __future__ import annotations

from bench.calls import Shape, exponentials, slots
from bench.chip import COPY, EX2, ISSUE, SLOTS, Work
from bench.svg import Line, chart

ROOFS = {"forward": EX2, "backward": ISSUE * 32 / SLOTS["backward"]}  # state updates a second


def is_one(result: dict) -> bool:
    return any("shape" in row and "ours" in row for row in result["rows"])


def scans(result: dict) -> list[dict]:
    """case, part, us of both, the bound and its name, the share of it, updates."""
    found = []
    for row in result["rows"]:
        if row["part"] not in ROOFS or "shape" not in row:
            continue
        op = "bidirectional_scan" if row["case"].startswith("both") else "selective_scan"
        name = op + ("_backward" if row["part"] == "backward" else "")
        shape = Shape(*row["shape"], row["dtype"])
        work = Work(row["bytes"], exponentials(name, shape), slots(name, shape))
        bound, least = work.bound()
        b, l, d, n = row["shape"]
        theirs = row["theirs"]["median_us"] if isinstance(row["theirs"], dict) else None
        found.append({
            "case": row["case"], "part": row["part"], "us": row["ours"]["median_us"], "theirs": theirs,
            "bytes": row["bytes"], "exponentials": work.exponentials, "bound": bound, "least": least,
            "share": least / row["ours"]["median_us"], "updates": b * l * d * n * (2 if op.startswith("bi") else 1),
        })  # fmt: skip
    return found


def table(result: dict) -> str:
    meta = result["meta"]
    lines = [
        f"# Scans on {meta['gpu']}",
        "",
        f"torch {meta['torch']}, Triton {meta['triton']}, driver {meta['driver']}; commit {meta['commit']}; medians of "
        f"{meta['rounds']} interleaved rounds, cold L2.  The bound is the largest of what bytes, exponentials and "
        "instructions need at an H200's rates (bench/chip.py); a share of it is what the kernels reach.",
        "",
        "```",
        meta["command"],
        "python -m bench report h200_scan.json",
        "```",
        "",
        "| case | part | us | mamba-ssm | ratio | MB | 10^9 exponentials | bound | us | share |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for s in scans(result):
        theirs = f"{s['theirs']:,.0f} | {s['theirs'] / s['us']:.1f}" if s["theirs"] else "– | –"
        lines.append(
            f"| {s['case']} | {s['part']} | {s['us']:,.0f} | {theirs} | {s['bytes'] / 1e6:,.0f} | "
            f"{s['exponentials'] / 1e9:.2f} | {s['bound']} | {s['least']:,.0f} | {s['share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict) -> str:
    rows = scans(result)
    lines = []
    for part in ROOFS:
        for who, key in (("ours", "us"), ("mamba-ssm", "theirs")):
            points = [
                (s["updates"] / s["bytes"], s["updates"] / s[key] / 1e6) for s in rows if s["part"] == part and s[key]
            ]
            at = [(x, y, y, y) for x, y in sorted(points)]
            if at:
                lines.append(Line(f"{who}, {part}", at, bold=who == "ours", dots=True))
    low, high = (f(s["updates"] / s["bytes"] for s in rows) for f in (min, max))
    for name, rate in ROOFS.items():
        corner = rate / COPY
        xs = [low, *([corner] if low < corner < high else []), high]
        lines.append(Line(f"bound, {name}", [(x, y := min(COPY * x, rate) / 1e12, y, y) for x in xs]))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    gpu = result["meta"]["gpu"]
    return chart(
        "Scans under their roofs", f"state updates on {gpu}, every case of the table", "state updates a byte moved",
        "10^12 state updates a second", lines, ticks,
    )  # fmt: skip
