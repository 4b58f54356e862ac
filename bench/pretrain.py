"""One update of masked pre-training, and its parts: milliseconds, memory, and what the data loader delivers beside it.

    python -m bench pretrain --device cuda                                   # bench/results/gpu_pretrain.json
    torchrun --standalone --nproc-per-node 2 -m bench pretrain --device cuda --only update   # as much for each GPU
    python -m bench pretrain --quick                                          # this CPU, seconds; writes nothing

update: the trainer's own step, from clips in page-locked memory of the host to changed weights.  student: its forward
and backward, the teacher's features given.  teacher: its forward.  They take turns; times are the device's, by events
(a CPU's clock).  peak_GiB is the most memory of tensors in all, on_top_GiB without what lay there before the call.
Weights are drawn, nothing is learned here.
loading: clips a second of the trainer's data loader alone, from mp4 files of 256 pixels that are generated for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.run import HERE, about, opened, save

PARTS = ("update", "student", "teacher", "loading")
FILM = {"frames": 150, "size": 256}  # 5 s, as the published collections are cut
UNCOUNTED = 3
FLAGS = {"model": "model", "batch_size": "clips", "clip.frames": "frames", "workers": "workers"}  # fields of the config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("tiny", "small", "middle"), default="small", help="of student and teacher")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clips", type=int, default=48, help="of a process (default 48)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART", help=", ".join(PARTS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the data loader")
    parser.add_argument("--seconds", type=float, default=15.0, help="that it is watched for")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the config, as a flag")
    parser.add_argument("--quick", action="store_true", help="nano models, two clips of 32 pixels, two rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default bench/results/DEVICE_pretrain.json")
    parser.add_argument("--commit", metavar="SHA", help="to be written down where there is no git repository")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of adding to the file")


def main(args: argparse.Namespace) -> int:
    from endomamba.train.world import start_world

    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"pretrain: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.quick:
        args.clips, args.frames, args.rounds, args.seconds, args.workers = 2, 4, 2, 1.0, 1
    with start_world(args.device) as world:
        found = measure(args, parts, world)
        if world.rank:
            return 0
        out = args.out or (
            None if args.quick else HERE / "results" / f"{'gpu' if args.device == 'cuda' else 'cpu'}_pretrain.json"
        )
        result = opened(out, about(args.device, args.commit), args.fresh)
        key = {
            "model": args.model,
            "clips": args.clips,
            "frames": args.frames,
            "processes": world.size,
            "set": args.set,
        }
        for part, numbers in found.items():
            row = {"part": part} | key | numbers
            result["rows"] = [r for r in result["rows"] if any(r[k] != row[k] for k in ("part", *key))] + [row]
            print(f"{part:8}", ", ".join(f"{name} {value}" for name, value in numbers.items()), flush=True)
        save(out, result)
    return 0


def measure(args: argparse.Namespace, parts: list[str], world: Any) -> dict[str, dict[str, float]]:
    import torch

    from endomamba.models import Teacher, create_model
    from endomamba.train import pretrain
    from endomamba.train.config import with_changes
    from endomamba.train.data import ClipConfig, Normalise
    from endomamba.train.loop import _Run

    config = pretrain.PretrainConfig(
        model=f"endomamba_{args.model}", clip=ClipConfig(frames=args.frames),
        precision="bf16" if args.device == "cuda" else "fp32",
    )  # fmt: skip
    teacher_options: dict[str, Any] = {"num_frames": args.frames}
    if args.quick:
        sizes = {"img_size": 32, "embed_dim": 32, "depth": 2}
        config = with_changes(config, {"model_options": sizes})
        teacher_options |= sizes
    config = with_changes(config, dict(read(part) for part in args.set))
    config = with_changes(config, {"batch_size": args.clips * world.size * config.accumulate})
    torch.manual_seed(0)
    model = pretrain.build(config).to(world.device).train()
    teacher = Teacher(
        create_model(f"videomamba_{args.model}", **teacher_options).to(world.device),
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision),
    )
    normalise = Normalise(config.clip.normalise, world.device)
    step = partial(pretrain.masked_step, model, teacher, normalise)
    batch = ready(args, model, world.device.type == "cuda")
    stub = SimpleNamespace(entries=())
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(
            config, model, step, stub, SimpleNamespace(per_epoch=1000), Path(folder), world, None, "", None, None
        )
    # `_next` counts the clips it draws, and how many it may lose
    run.dataset = range(args.clips * world.size * 1000)
    batches, turn = itertools.repeat(batch), itertools.count()
    video = normalise(batch["video"].to(world.device))
    mask = batch["mask"].to(world.device)
    features = teacher(video)

    def student() -> None:
        with config.autocast(world.device):
            loss = model(video, mask, features).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    calls: dict[str, Callable[[], object]] = {
        "update": lambda: run._update(next(turn), batches), "student": student, "teacher": lambda: teacher(video),
    }  # fmt: skip
    calls = {part: call for part, call in calls.items() if part in parts}
    found = timed(calls, args.rounds, world.device)
    for part, numbers in found.items():
        clips = args.clips * world.size * (config.accumulate if part == "update" else 1)
        numbers["clips_per_second"] = round(1e3 * clips / numbers["ms"], 1)
        if part == "update" and not all(p.isfinite().all() for p in model.parameters()):
            raise SystemExit("pretrain: the weights are not finite: no time for a wrong result")
    if "loading" in parts and world.rank == 0:
        found["loading"] = loading(args, config, model)
    return found


def read(text: str) -> tuple[str, Any]:
    import ast

    name, found, value = text.partition("=")
    if not found or name in FLAGS:
        why = f"--{FLAGS[name]} sets it" if name in FLAGS else "it must be FIELD=VALUE"
        raise SystemExit(f"pretrain: --set {text}: {why}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def ready(args: argparse.Namespace, model: Any, pin: bool) -> dict[str, Any]:
    """What the data loader would give."""
    import torch

    size, generator = model.config.size[0], torch.Generator().manual_seed(1)
    shape = (args.clips, 3, args.frames, size, size)
    tensors = {
        "video": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "mask": torch.stack([model.config.draw_mask(args.frames, seed=0, key=i) for i in range(args.clips)]),
    }
    tensors = {name: tensor.pin_memory() if pin else tensor for name, tensor in tensors.items()}
    return tensors | {"samples": [None] * args.clips, "faults": []}


def timed(calls: dict[str, Callable[[], object]], rounds: int, device: Any) -> dict[str, dict[str, float]]:
    """Median milliseconds, and on a GPU the peak of memory."""
    import torch

    gpu = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks, tops = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0)
    for i in range(UNCOUNTED + rounds if gpu else 1 + rounds):
        for name, call in calls.items():
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
                begin.record()
                call()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end)
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
                tops[name] = max(tops[name], torch.cuda.max_memory_allocated() - held)
            else:
                start = time.perf_counter()
                call()
                took = 1e3 * (time.perf_counter() - start)
            if i >= (UNCOUNTED if gpu else 1):
                times[name].append(took)
    found = {}
    for name, took in times.items():
        found[name] = {
            "ms": round(statistics.median(took), 2),
            "least": round(min(took), 2),
            "most": round(max(took), 2),
        }
        if gpu:
            found[name] |= {"peak_GiB": round(peaks[name] / 2**30, 2), "on_top_GiB": round(tops[name] / 2**30, 2)}
    return found


def film(job: tuple[str, int, dict[str, int]]) -> None:
    from endomamba import synthetic

    folder, seed, sizes = job
    synthetic.write(synthetic.SyntheticVideo("base", split="train", seed=seed, **sizes), folder)


def loading(args: argparse.Namespace, config: Any, model: Any) -> dict[str, float]:
    """The trainer's loader on as many films as workers, each clip another place in one of them."""
    from endomamba.train.data import load
    from endomamba.train.manifest import Entry, Manifest
    from endomamba.train.plan import ClipPlan
    from endomamba.train.pretrain import MaskedClips

    sizes = {"frames": 20, "size": 64} if args.quick else FILM
    with tempfile.TemporaryDirectory() as folder:
        with Pool(args.workers) as pool:
            pool.map(film, [(folder, seed, sizes) for seed in range(args.workers)])
        files = sorted(path.name for path in Path(folder).glob("*.mp4"))
        entries = tuple(Entry(name, 0, sizes["frames"]) for name in files * args.clips)
        dataset = MaskedClips(config, model, Manifest(Path(folder, "films.jsonl"), (), entries), entries)
        plan = ClipPlan(len(dataset), args.clips, 0)
        batches = load(dataset, (plan(i) for i in range(10**6)), args.workers, pin=False)
        for _ in range(max(2, 5 * args.workers // 4)):  # what was fetched ahead while workers started
            next(batches)
        start, clips = time.perf_counter(), 0
        while time.perf_counter() - start < args.seconds:
            batch = next(batches)
            if batch.get("fatal") or batch["faults"]:
                raise SystemExit(f"pretrain: a film could not be read: {batch.get('fatal') or batch['faults'][0]}")
            clips += args.clips
        took = time.perf_counter() - start
        del batches
    return {"workers": args.workers, "clips_per_second": round(clips / took, 1), "film_size": sizes["size"]}
