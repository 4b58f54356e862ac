"""Whether pre-training, alignment, carried state and the backbone help, on synthetic variants nothing was trained on.

docs/evidence.md says what is asked and how it is answered; the plan itself is `plan` here.  Videos are drawn by the
frozen generator, trainings are those of `endomamba pretrain` and `endomamba finetune`, models have less than 1 M
parameters.  Results are appended to OUT/runs.jsonl as they come, and the same command does what is missing there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.pool import Task, carry_out

HELD_OUT = ("other-textures", "other-motion", "other-polyps", "all-other")
RECIPES = {
    "classification": "nano-polyps",
    "segmentation": "nano-masks",
    "phase": "nano-clip-phases",
    "localisation": "nano-landmarks",
}
# Of every test video; an effect is that of the first.
NUMBERS = {
    "classification": ("video_balanced_accuracy", "accuracy"),
    "segmentation": ("dice", "frame_dice"),
    "phase": ("accuracy", "video_balanced_accuracy"),
    "localisation": ("pck_10", "visibility_accuracy"),
}
RESAMPLES = 10_000


# ---- the plan


@dataclass(frozen=True)
class Scale:
    """videos: of "base" to train on; labelled: of them in the runs with few labels; teacher: of the variant "teacher";
    test: of each held-out variant; beside: of "base" to test on beside them.  *_steps: updates."""

    frames: int = 600
    size: int = 128
    videos: int = 50
    labelled: int = 5
    teacher: int = 20
    test: int = 6
    beside: int = 2
    seeds: int = 3
    pretrain_steps: int = 1000
    steps: int = 450
    changes: dict[str, Any] = field(default_factory=dict)  # of every config
    widths: dict[str, Any] = field(default_factory=lambda: {"embed_dim": 96, "depth": 8, "img_size": 128})


QUICK = Scale(
    frames=80, size=32, videos=2, labelled=1, teacher=1, test=1, beside=1, seeds=1,
    pretrain_steps=2, steps=2,
    changes={"batch_size": 2, "precision": "fp32", "clip.frames": 4, "log_every": 1},
    widths={"embed_dim": 16, "depth": 2, "img_size": 32},
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training and its test.  weights, teacher: runs it starts or learns from.  steps: 0 tests `weights` alone."""

    name: str
    config: Any
    videos: tuple[str, ...]
    steps: int
    weights: str = ""
    teacher: str = ""

    @property
    def layout(self) -> str:
        return "synth-polyps" if getattr(self.config, "task", "") == "classification" else "synth"


def videos(variant: str, split: str, count: int) -> tuple[str, ...]:
    return tuple(f"{variant}-{split}-{seed:06d}" for seed in range(count))


def test_videos(scale: Scale) -> tuple[str, ...]:
    counts = {"base": scale.beside, **dict.fromkeys(HELD_OUT, scale.test)}
    return tuple(name for variant, count in counts.items() for name in videos(variant, "test", count))


def plan(scale: Scale) -> list[Run]:
    """All runs, the most important first."""
    from endomamba.train import recipes
    from endomamba.train.config import with_changes
    from endomamba.train.pretrain import PretrainConfig

    frames, width = scale.changes.get("clip.frames", 16), scale.widths["embed_dim"]
    mamba = {**recipes.LONG_MEMORY, **scale.widths, "drop_path_rate": 0.0, "num_frames": frames}
    attention = {"depth": scale.widths["depth"] // 2, "num_heads": max(1, width // 32)}
    endofm = {**scale.widths, **attention, "drop_path_rate": 0.0, "num_frames": frames}
    backbones = {"videomamba": mamba, "endofm": endofm}
    base, other = videos("base", "train", scale.videos), videos("teacher", "train", scale.teacher)
    seeds = range(scale.seeds)

    def config(recipe: str, seed: int, kind: Any = None, **changes: Any) -> Any:
        found = recipes.find(recipe, None, *([kind] if kind else []))
        options = {**found.model_options, **scale.widths}
        common = {"model_options": options, "seed": seed, "workers": 0, "save_every": 10**6, **scale.changes}
        if getattr(found, "reset", 0):  # judged in windows as long as the clips it learned from
            common["reset"] = frames
        return with_changes(found, {**common, **changes})

    def tuned(task: str, arm: str, seed: int, names: Sequence[str], weights: str = "", **changes: Any) -> Run:
        return Run(f"{task}/{arm}/{seed}", config(RECIPES[task], seed, **changes), tuple(names), scale.steps, weights)

    def of_backbone(task: str, name: str, seed: int) -> Run:
        head = {k: v for k, v in recipes.find(RECIPES[task]).model_options.items() if k == "head_width"}
        return tuned(task, name, seed, base, model=name, model_options={**backbones[name], **head})

    def few(seed: int) -> tuple[str, ...]:
        return base[seed * scale.labelled : (seed + 1) * scale.labelled] or base[: scale.labelled]

    plain = [config("nano-clips", seed, PretrainConfig) for seed in seeds]
    aligned = [
        replace(c, teacher="videomamba", align_weight=0.25, teacher_options=backbones["videomamba"]) for c in plain
    ]
    teacher = tuned("phase", "teacher", 0, other, model="videomamba", model_options=backbones["videomamba"])
    runs = [Run(f"pretrain/plain/{s}", plain[s], base, scale.pretrain_steps) for s in seeds]
    runs += [replace(teacher, name="teacher", steps=2 * scale.steps)]
    runs += [Run(f"pretrain/aligned/{s}", aligned[s], base, scale.pretrain_steps, teacher="teacher") for s in seeds]
    for arm, weights in (("plain-10", "pretrain/plain"), ("scratch-10", ""), ("aligned-10", "pretrain/aligned")):
        runs += [
            tuned(task, arm, s, few(s), weights and f"{weights}/{s}") for s in seeds for task in RECIPES
        ]  # fmt: skip
    runs += [Run(f"phase/carried/{s}", config("nano-carried-phases", s), base, scale.steps) for s in seeds]
    for task in ("phase", "segmentation", "classification", "localisation"):
        runs += [tuned(task, "endomamba", s, base) for s in seeds]
        runs += [of_backbone(task, name, s) for name in backbones for s in seeds]
    streamed = [replace(tuned("phase", "streamed", s, base, f"phase/endomamba/{s}", reset=0), steps=0) for s in seeds]
    return runs + streamed


# What is asked of each task: the two arms, by their names in the plan.
QUESTIONS = [
    *(("pre-trained or from scratch, 10 % of the labels", task, "plain-10", "scratch-10") for task in RECIPES),
    *(("aligned with a teacher or not, 10 % of the labels", task, "aligned-10", "plain-10") for task in RECIPES),
    ("carried state or clips of 16 frames", "phase", "carried", "endomamba"),
    ("trained on clips of 16: state carried in the test or not", "phase", "streamed", "endomamba"),
    *(("EndoMamba or VideoMamba, from scratch", task, "endomamba", "videomamba") for task in RECIPES),
    *(("EndoMamba or Endo-FM, from scratch", task, "endomamba", "endofm") for task in RECIPES),
]


# ---- what a process does


def draw(name: str, scale: Scale, data: Path) -> dict[str, Any]:
    """A video with its truth in a folder of its own, and what it lists as in both layouts."""
    from endomamba import synthetic
    from endomamba.train import manifest
    from endomamba.train.layouts import LAYOUTS

    folder = data / name
    if not (folder / "synth.jsonl").exists():
        variant, split, seed = name.rsplit("-", 2)
        video = synthetic.SyntheticVideo(variant, split=split, seed=int(seed), frames=scale.frames, size=scale.size)
        synthetic.write(video, folder, force=True)
        for layout in ("synth-polyps", "synth"):
            classes, entries = LAYOUTS[layout].convert(folder)
            if entries:  # a short video may show no polyp long enough
                manifest.write(folder / f"{layout}.jsonl", classes, entries)
    return {"video": name}


def collect(data: Path, names: Sequence[str], layout: str, split: str) -> Any:
    """One manifest of many videos, all in `split`."""
    from endomamba.train import manifest

    files = {name: data / name / f"{layout}.jsonl" for name in names}
    read = {name: manifest.read(file) for name, file in files.items() if file.exists()}
    entries = [
        replace(entry, path=f"{name}/{entry.path}", mask=f"{name}/{entry.mask}", landmarks=f"{name}/{entry.landmarks}",
                box=None, split=split)
        for name, listed in read.items() for entry in listed.entries
    ]  # fmt: skip
    return manifest.Manifest(data / "together.jsonl", next(iter(read.values())).classes, tuple(entries))


def do(run: Run, scale: Scale, work: Path, device: str) -> dict[str, Any]:
    """Trains and tests; -> what stands in runs.jsonl."""
    import torch

    from endomamba.train import finetune, pretrain
    from endomamba.train.world import World

    torch.set_num_threads(1)
    world = World(torch.device(device))
    began, folder, data = time.monotonic(), folder_of(work, run.name), work / "data"
    train = collect(data, run.videos, run.layout, "train")
    config, weights = in_steps(run, train, work), ""
    if run.steps:
        weights = str(folder / "final.safetensors")
        (pretrain.run if isinstance(config, pretrain.PretrainConfig) else finetune.run)(config, train, folder, world)
    else:
        config, weights = replace(config, weights=""), config.weights
    row: dict[str, Any] = {"run": run.name, "steps": run.steps, "train_s": round(time.monotonic() - began, 1)}
    if run.steps:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        last = [found for found in map(json.loads, lines) if found["kind"] == "train"][-1]
        row["loss"] = round(last["loss"], 5)
    if not isinstance(config, pretrain.PretrainConfig):
        model, row["videos"] = test(config, weights, collect(data, test_videos(scale), run.layout, "test"), world)
        row["parameters"] = sum(p.numel() for p in model.parameters())
    return row | {"seconds": round(time.monotonic() - began, 1)}


def kind_of(run: str) -> str:
    """Runs of a kind take about as long for an update."""
    task, _, arm = run.partition("/")
    return task if task == "pretrain" or not arm else f"{task} {arm.partition('/')[0].partition('-')[0]}"


def folder_of(work: Path, run: str) -> Path:
    return work / "runs" / run.replace("/", "-")


def in_steps(run: Run, train: Any, work: Path) -> Any:
    """The config with as many epochs as make the steps of the run, and with the files of runs before."""
    from endomamba.train.plan import ClipPlan, StreamPlan

    config, each = run.config, [len(entry) for entry in train.entries]
    if getattr(config, "memory", "clip") == "carried":
        per_epoch = StreamPlan(each, config.batch_size, config.clip.frames * config.clip.stride, 0).per_epoch
    else:
        per_epoch = ClipPlan(len(each), config.batch_size, 0).per_epoch
    before = {name: of for name, of in (("weights", run.weights), ("teacher_weights", run.teacher)) if of}
    files = {name: str(folder_of(work, of) / "final.safetensors") for name, of in before.items()}
    epochs = max(run.steps, 1) / per_epoch
    return replace(config, epochs=epochs, warmup=epochs / 10, **files)


def test(config: Any, weights: str, listed: Any, world: Any) -> tuple[Any, dict[str, list[float | None]]]:
    """-> the model, and of each video the NUMBERS of its task."""
    import torch

    from endomamba.train import evaluate, finetune
    from endomamba.train.metrics import landmark_scores, overlap, video_scores
    from endomamba.train.tasks import TASKS

    task = TASKS[config.task]
    model = finetune.build(config, listed, weights, head=True).to(world.device).eval()
    dataset = evaluate.open_split(config, listed, "test", model.config.size[0])
    dataset.train = False
    read = evaluate.read_clips if config.task == "classification" else evaluate.read_videos
    found: dict[str, list[Any]] = defaultdict(list)
    with torch.no_grad():
        answers = read(config, model, dataset, range(len(dataset)), world, task.predict)
        for entry, (predicted, true, _) in zip(dataset.entries, answers):
            found[Path(entry.path).parent.name].append((predicted, true))
    rows = {}
    for video, pairs in found.items():
        joined = [tuple(torch.cat(column) for column in zip(*pairs))]
        if config.task == "segmentation":
            judged = overlap(*joined[0])
        elif config.task == "localisation":
            judged = landmark_scores(*joined[0])
        else:
            judged = video_scores(joined, len(listed.classes))
        values = [judged[number] for number in NUMBERS[config.task]]
        rows[video] = [round(value, 4) if value == value else None for value in values]
    return model, rows


# ---- what it says


def by_variant(rows: dict[str, list[float]]) -> dict[str, list[float]]:
    """The means over the videos of each variant."""
    variants: dict[str, list[list[float]]] = defaultdict(list)
    for video, numbers in rows.items():
        variants[video.rsplit("-", 2)[0]].append(numbers)
    return {v: [float(x) for x in np.nanmean(np.array(n, float), 0)] for v, n in variants.items()}


def interval(differences: np.ndarray, groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Of the mean of (seeds, videos): 95 %, by drawing seeds and, within each group, videos again."""
    random, groups = np.random.default_rng(seed), np.asarray(groups)
    seeds = random.integers(0, len(differences), (RESAMPLES, len(differences)))
    places = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups)]
    drawn = np.concatenate([random.choice(place, (RESAMPLES, len(place))) for place in places], 1)
    means = np.nanmean(differences[seeds[:, :, None], drawn[:, None, :]], axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def effects(rows: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each question: both arms over held-out videos, their difference and its interval; only of seeds that both
    arms have."""
    for question, task, one, other in QUESTIONS:
        seeds = [s for s in range(100) if all("videos" in rows.get(f"{task}/{arm}/{s}", {}) for arm in (one, other))]
        if not seeds:
            yield {"question": question, "task": task, "arms": [one, other], "seeds": 0}
            continue
        first = rows[f"{task}/{one}/{seeds[0]}"]["videos"]
        names = [name for name in first if not name.startswith("base-")]
        values = np.array([[[rows[f"{task}/{arm}/{s}"]["videos"][name][0] for name in names] for s in seeds]
                           for arm in (one, other)], float)  # fmt: skip
        difference, groups = values[0] - values[1], [name.rsplit("-", 2)[0] for name in names]
        low, high = interval(difference, groups)
        of_variant = {g: round(float(np.nanmean(difference[:, np.array(groups) == g])), 4) for g in HELD_OUT}
        yield {
            "question": question, "task": task, "arms": [one, other], "number": NUMBERS[task][0],
            "seeds": len(seeds), "videos": len(names), "means": [round(float(np.nanmean(v)), 4) for v in values],
            "effect": round(float(np.nanmean(difference)), 4), "interval": [round(low, 4), round(high, 4)],
            "by_seed": [round(float(x), 4) for x in np.nanmean(difference, 1)], "by_variant": of_variant,
        }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| question | task, number | first | second | difference | 95 % interval |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in found:
        what = f"| {row['question']} | {row['task']}"
        if not row["seeds"]:
            lines.append(f"{what} | | | | not run |")
            continue
        one, other = row["means"]
        low, high = row["interval"]
        seeds = "" if row["seeds"] == 3 else f" ({row['seeds']} seeds)"
        lines.append(f"{what}, {row['number']} | {one:.3f} | {other:.3f} | {row['effect']:+.3f} | "
                     f"{low:+.3f} to {high:+.3f}{seeds} |")  # fmt: skip
    return "\n".join(lines)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """By run, the last line of each that has a result, else the last."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, lines):
        remember(rows, row)
    return rows


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `write_report` was given, by run."""
    tested, rows = report["meta"]["test_videos"], {}
    for row in report["runs"]:
        rows[row["run"]] = {name: value for name, value in row.items() if name != "numbers"}
        if "numbers" in row:
            rows[row["run"]]["videos"] = dict(zip(tested, row["numbers"]))
    return rows


def remember(rows: dict[str, dict[str, Any]], row: dict[str, Any]) -> None:
    if "problem" not in row or "problem" in rows.get(row["run"], row):
        rows[row["run"]] = row


def machine(device: str) -> dict[str, Any]:
    import torch

    facts = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    return facts | {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}


def commit_of() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, text=True, capture_output=True)
    return done.stdout.strip() or "not known"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="runs.jsonl and learns.json")
    parser.add_argument("--work", type=Path, help="videos, checkpoints and logs; default: OUT/work")
    parser.add_argument("--go-on", type=Path, metavar="FILE", help="a learns.json whose results need not come again")
    parser.add_argument("--quick", action="store_true", help="everything once, tiny, on a CPU: that it runs")
    parser.add_argument("--only", default="", help="runs whose names begin so, and what they need; several with commas")
    parser.add_argument("--minutes", type=float, default=600.0, help="nothing is started that would not end by then")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"))
    parser.add_argument("--scale", default="", help="fields of Scale, such as steps=50,seeds=1")
    parser.add_argument("--commit", default=None, help="of this checkout; default: git's")


def needed(runs: list[Run], only: str) -> list[Run]:
    """Those whose names begin as `only` says, with all that they need; in order."""
    known = {run.name: run for run in runs}
    wanted = {name for name in known if any(name.startswith(part) for part in only.split(","))}
    while more := {w for n in wanted for w in (known[n].weights, known[n].teacher) if w} - wanted:
        wanted |= more
    return [run for run in runs if run.name in wanted]


def missing(runs: list[Run], rows: dict[str, Any], work: Path) -> list[Run]:
    """Those without a result, and those whose weights they need and which do not lie in `work` any more."""
    known, left = {run.name: run for run in runs}, [run.name for run in runs if "seconds" not in rows.get(run.name, {})]
    for name in left:  # grows meanwhile
        before = (known[name].weights, known[name].teacher)
        left += [n for n in before if n and n not in left and not (folder_of(work, n) / "final.safetensors").exists()]
    return [run for run in runs if run.name in left]


def main(args: argparse.Namespace) -> int:
    import torch

    began = time.monotonic()
    scale = QUICK if args.quick else Scale()
    changes = (part.partition("=") for part in args.scale.split(",") if part)
    scale = replace(scale, **{name: int(value) for name, _, value in changes})
    device = args.device or ("cuda" if torch.cuda.is_available() and not args.quick else "cpu")
    work, lines = (args.work or args.out / "work").absolute(), args.out / "runs.jsonl"
    commit = args.commit or commit_of()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = (rows_of(json.loads(args.go_on.read_text())) if args.go_on else {}) | read_rows(lines)
    runs = missing(needed(plan(scale), args.only), rows, work)
    tasks: dict[str, Task] = {}
    for run in runs:
        names = run.videos if run.name.startswith("pretrain/") else (*run.videos, *test_videos(scale))
        for name in names:
            tasks.setdefault(name, Task(name, partial(draw, name, scale, work / "data"), kind="video"))
        before = [name for name in (run.weights, run.teacher) if any(name == other.name for other in runs)]
        call = partial(do, run, scale, work, device)
        tasks[run.name] = Task(run.name, call, (*names, *before), kind_of(run.name), max(100, run.steps))
    problems = 0
    with lines.open("a") as file:
        seconds = 60 * args.minutes - (time.monotonic() - began)
        for result in carry_out(list(tasks.values()), args.workers, seconds, work / "logs"):
            at = time.monotonic() - began
            if result.problem or "run" in result.answer:
                row = {"run": result.task.name, "problem": result.problem} if result.problem else result.answer
                problems += bool(result.problem)
                remember(rows, row)
                file.write(json.dumps(row) + "\n")
                file.flush()
            print(f"{at:6.1f} s  {result.task.name}  {result.problem or 'done'}", flush=True)
    earlier = json.loads(args.go_on.read_text()) if args.go_on else {}
    write_report(args.out, rows, scale, device, commit, time.monotonic() - began, earlier)
    return 1 if problems else 0


def came_before(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs that a report is of: commit, minutes and what each brought."""
    if not report:
        return
    meta = report["meta"]
    before = meta.get("earlier", [])
    yield from before
    known = {name for run in before for name in run["runs"]}
    own = sorted(row["run"] for row in report["runs"] if "numbers" in row and row["run"] not in known)
    yield {"commit": meta["commit"], "wall_minutes": meta["wall_minutes"], "runs": own}


def write_report(
    out: Path, rows: dict[str, Any], scale: Scale, device: str, commit: str, seconds: float, earlier: dict[str, Any]
) -> None:
    """earlier: the report that this run went on with, of which some results are, and what was withdrawn from it."""
    from endomamba.synthetic import VARIANTS

    found = list(effects(rows))
    tested = test_videos(scale)
    runs = {}
    for name, row in rows.items():
        runs[name] = {key: value for key, value in row.items() if key not in ("run", "videos")}
        if "videos" in row:
            runs[name]["numbers"] = [row["videos"][video] for video in tested if video in row["videos"]]
    meta = {
        "command": "python -m bench learns --out OUT",
        "commit": commit,
        "scale": {name: value for name, value in vars(scale).items() if name not in ("changes", "widths")},
        "generator": {name: params.digest() for name, params in VARIANTS.items()},
        "machine": machine(device),
        "wall_minutes": round(seconds / 60, 2),
        "numbers": NUMBERS,
        "test_videos": tested,
        "not_done": sorted(name for name, row in rows.items() if "problem" in row),
        "earlier": list(came_before(earlier)),
    }
    if "withdrawn" in earlier.get("meta", {}):
        meta["withdrawn"] = earlier["meta"]["withdrawn"]
    parts = [f'"meta": {json.dumps(meta, indent=1)}']
    listings = [("effects", found), ("runs", [{"run": name, **row} for name, row in runs.items()])]
    for title, listed in (*listings, ("withdrawn", earlier.get("withdrawn", []))):
        parts.append(f'"{title}": [\n' + ",\n".join(json.dumps(row) for row in listed) + "\n]")
    (out / "learns.json").write_text("{" + ",\n".join(parts) + "}\n")
    print(table(found), flush=True)
