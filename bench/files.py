"""Two JSON files of pytest-benchmark compared: a weaker statement than two commits measured side by side."""

from __future__ import annotations

import json
from pathlib import Path

from bench import machine, stats
from bench.exact import Finding
from bench.gate import Report
from bench.worktrees import UsageError

THRESHOLD = 1.25
FEWEST = 5  # times of a benchmark
MACHINE = ("node", "machine", "processor", "system", "release", "python_implementation", "python_version")


def compare(base_file: Path, head_file: Path, alpha: float, threshold: float | None) -> tuple[Report, dict]:
    base, head = read(base_file), read(head_file)
    machine.require_equal("the files are of different machines", base["machine"], head["machine"])
    report, limit = Report(), threshold or THRESHOLD
    report.note(
        "two separate runs, not interleaved: what the machine did meanwhile is in the ratio and cannot be told apart, "
        f"so only a ratio surely over {limit} is a finding; revisions can be compared more closely"
    )
    names = [name for name in head["times"] if name in base["times"]]
    for name in sorted({*head["times"], *base["times"]} - {*names}):
        report.note(f"not compared: {name} is in one file only")
    if not names:
        raise UsageError("the files have no benchmark in common")
    for name in names:
        ratio = stats.unpaired(base["times"][name], head["times"][name], alpha / len(names))
        verdict = stats.verdict(ratio, limit)
        report.row(name).update(ratio=ratio.middle, interval=[ratio.low, ratio.high], verdict=verdict)
        print(f"{name:52} {ratio} {verdict}", flush=True)
        if verdict == "slower":
            says = f"ratio={ratio.middle:.3f} interval=[{ratio.low:.3f}, {ratio.high:.3f}], surely over {limit}"
            report.find(Finding("time", **head["labels"][name], says=says))
    return report, base["machine"]


def read(path: Path) -> dict:
    """Times and labels by benchmark, and what identifies the machine."""
    try:
        data = json.loads(path.read_text())
        info, rows = data["machine_info"], {row["fullname"]: row for row in data["benchmarks"]}
        times = {name: row["stats"].get("data") or [] for name, row in rows.items()}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no JSON file of pytest-benchmark: {type(error).__name__} {error}") from error
    short = next((name for name, measured in times.items() if len(measured) < FEWEST), None)
    if short:
        raise UsageError(f"{path}: {short} has fewer than {FEWEST} times; pytest writes them with --benchmark-json")
    return {
        "machine": {key: info.get(key) for key in MACHINE} | {"cpu": info.get("cpu", {}).get("brand_raw")},
        "times": times,
        "labels": {name: labels(row) for name, row in rows.items()},
    }


def labels(row: dict) -> dict[str, str]:
    """op, shape and back end: extra_info has them where bench/test_cases.py wrote the file."""
    extra = row.get("extra_info") or {}
    return {"op": extra.get("op", row["name"]), **{key: extra.get(key, "-") for key in ("shape", "backend")}}
