"""FrameStream, frame by frame: from a picture on the device or the host to its answer, with the tail of the latency.

    python -m bench frame --device cuda --frames 2000                         # bench/results/gpu_frame.json
    python -m bench frame --device cuda --frames 20000 --only "resident 224,buffer"   # the tail
    python -m bench frame --device cuda --only mp4,parallel                   # a whole film; the error over time
    python -m bench frame --quick                                             # this CPU, seconds; writes nothing

A frame's time is the host's, from before the call until the device has finished it; the device's own, by events, is
taken from other frames, so that neither clock is in the other.  Cases take turns of so many frames, after some that are
not counted.  Accuracy comes first, against the fp64 parallel pass.  Kernels are counted, and timed for the budget, in a
profile of one frame.  What is not there is listed with its reason.  Two kinds of cases are runs of their own, that
take no turns: a film from its mp4 to the answers (`bench/film.py`), and a long stream beside the parallel pass
(`bench/drift.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import cases, drift, film
from bench.frame_setting import Setting
from bench.run import HERE, Wrong, about, opened, save

UNCOUNTED = 5  # frames at the start of a turn: the others' turns cost it its caches
HD = (1080, 1920)
BUSY_BYTES = 64 << 20  # of the copies beside
BY_EVENTS = 2000  # frames of a case that events time, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=cases.WIDTH, default="small")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=cases.TOLERANCE, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--backend", default="auto", help="of the ops (default auto)")
    parser.add_argument("--frames", type=int, default=2000, help="of each case, by each clock (default 2000)")
    parser.add_argument("--turn", type=int, default=200, help="frames of a case before the next has its turn")
    parser.add_argument("--streams", type=int, default=16, help="in the case with many (default 16)")
    parser.add_argument(
        "--only", default="", metavar="WORD,WORD", help="cases whose name has, or is, one of these words"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="frames of 32 pixels, 4 layers, 6 frames")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default bench/results/DEVICE_frame.json")
    parser.add_argument("--commit", metavar="SHA", help="to be written down where there is no git repository")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of adding to the file")


def main(args: argparse.Namespace) -> int:
    try:
        run(args)
    except Wrong as error:
        print(f"frame: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    import torch

    gpu = args.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        raise Wrong(f"--device {args.device}: there is no GPU here")
    if args.device == "cuda":
        args.device = f"cuda:{torch.cuda.current_device()}"
    torch.set_num_threads(args.threads)
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    if args.quick:
        args.frames, args.turn = 6, 6
    out = args.out or (None if args.quick else HERE / "results" / f"{'gpu' if gpu else 'cpu'}_frame.json")
    settings = {"threads": args.threads, "quick": args.quick}
    result = opened(out, about(args.device, args.commit) | settings, args.fresh)
    setting = Setting(args, (32, 4) if args.quick else (224, None), (48, 64) if args.quick else HD)
    device = Gpu(args.device) if gpu else Cpu()
    wanted = chosen(listed(setting), args.only.split(","))
    if not wanted:
        raise Wrong(f"--only {args.only}: no case has that in its name")
    key = {"model": args.model, "dtype": args.dtype, "backend": args.backend}
    names = {case.name for case in wanted}
    for part in ("rows", "missing"):  # what is measured now takes the place of what was
        result[part] = [row for row in result[part] if row["case"] not in names or row | key != row]
    ready = []
    for case in wanted:
        why = case.why or made(case, setting)
        if why:
            result["missing"].append({"case": case.name, "why": why} | key)
            print(f"{case.name:44} not measured: {why}", flush=True)
        else:
            ready.append(case)
    measured([case for case in ready if isinstance(case, Case)], device, args)
    save(out, result)
    for case in ready:
        found = summary(case, device) if isinstance(case, Case) else case.measure() | {"error": case.off}
        row = {"case": case.name} | key | found
        result["rows"].append(row)
        print(line(row) if isinstance(case, Case) else case.tell(row), flush=True)
        save(out, result)
    if out:
        print(f"written to {out}")


def chosen(cases: list[Case | Whole], words: list[str]) -> list[Case | Whole]:
    """Those that have one of the words in their name; a word that is a whole name means that case alone."""
    names = {case.name for case in cases}
    fits = lambda word, name: word == name if word in names else word in name  # noqa: E731
    return [case for case in cases if any(fits(word, case.name) for word in words)]


# ---- cases -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """make: -> the call, which starts a frame of every stream; error: of its answer, None where nothing tells.

    busy: copies run beside it.  few: it is slow and gets a twentieth of the frames.  slack: of the tolerance.
    """

    name: str
    make: Callable[[], Callable[[], object]]
    error: Callable[[], float] | None = None
    why: str = ""
    streams: int = 1
    busy: bool = False
    few: bool = False
    slack: float = 1.0
    call: Callable[[], object] = print
    off: float = 0.0  # the error
    host_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    grown: int = 0


@dataclass
class Whole:
    """A run that takes no turns: `measure` gives its row, `tell` makes a line of it.  The rest as in `Case`."""

    name: str
    measure: Callable[[], dict]
    tell: Callable[[dict], str]
    error: Callable[[], float]
    why: str = ""
    slack: float = 1.0
    off: float = 0.0


def listed(setting: Setting) -> list[Case | Whole]:
    from bench import published

    own, large, many = setting.own, setting.large, setting.args.streams
    shown = f"{large[1]}x{large[0]}"
    no_gpu = "" if setting.gpu else "there is no GPU here"
    no_vit = "" if setting.args.dtype == "bf16" else "it is timed in bf16"
    of_film, of_large, long = setting.lengths

    def ours(name: str, make: Callable, why: str = "", busy: bool = False, few: bool = False, **options) -> Case:
        streams = options.get("streams", 1)
        return Case(name, partial(make, setting, **options), partial(setting.error, **options), why, streams, busy, few)

    def other(name: str, make: Callable, error: Callable, why: str = "") -> Case:
        return Case(name, partial(make, setting), error, no_gpu or no_vit or why, slack=2.0)  # as in Options.tolerance

    def whole(name: str, measure: Callable, tell: Callable, why: str, size=None) -> Whole:
        return Whole(name, measure, tell, partial(setting.error, size=size), why)

    return [
        ours(f"resident {own[0]}", resident_call),
        ours(f"resident {own[0]}, copies busy", resident_call, no_gpu, busy=True),
        ours(f"resident {own[0]} in the stream's buffer", partial(resident_call, copied=False)),
        ours(f"resident {shown}", resident_call, size=large),
        ours(f"resident {shown} in the stream's buffer", partial(resident_call, copied=False), size=large),
        ours(f"pinned {shown} to host", host_call, no_gpu, size=large),
        ours(f"pinned {shown} to host, copies busy", host_call, no_gpu, busy=True, size=large),
        ours(f"pageable {shown} to host", partial(host_call, pinned=False), size=large),
        ours(f"pinned {own[0]} to host", host_call, no_gpu),
        ours(f"{many} streams resident {own[0]}", resident_call, streams=many),
        ours(f"eager resident {own[0]}", resident_call, no_gpu, few=True, graph=False),
        other("ViT/16 bf16, compiled, graph", vit_call, lambda: setting.vit.error()),
        other(
            "published kernels bf16, graph", published_call, lambda: setting.published.error(),
            published.missing(state=True),
        ),
        whole(f"mp4 {own[0]}", partial(film.film, setting, own, of_film), film.told, film.missing()),
        whole(f"mp4 {shown}", partial(film.film, setting, large, of_large), film.told, film.missing(), size=large),
        whole(f"{long} frames by the fp32 parallel pass", partial(drift.drift, setting, long), drift.told, ""),
    ]  # fmt: skip


def resident_call(
    setting: Setting, streams: int = 1, size=None, graph: bool | None = None, copied: bool = True
) -> Callable[[], object]:
    """uint8 pictures on the device -> answers there.  copied: from memory of the caller's."""
    import torch

    camera = setting.stream(streams, size, graph)
    frames = torch.stack([setting.picture(size or setting.own, number) for number in range(streams)])
    if copied:
        return partial(camera.step, frames.to(setting.args.device))
    return partial(camera.step, camera.buffer(size or setting.own).copy_(frames))


def host_call(setting: Setting, size=None, pinned: bool = True) -> Callable[[], object]:
    """A uint8 picture on the host -> its answer on the host."""
    camera = setting.stream(size=size)
    rgb = setting.picture(size or setting.own, pinned=pinned)
    answer = camera(rgb).cpu()
    answer = answer.pin_memory() if setting.gpu else answer
    return lambda: answer.copy_(camera.step(rgb), non_blocking=True)


def vit_call(setting: Setting) -> Callable[[], object]:
    """The image model without a memory, from a normalised frame on the device: preprocessing costs it nothing."""
    import torch

    with torch.inference_mode():
        return setting.vit.prepare(1).call


def published_call(setting: Setting) -> Callable[[], object]:
    """Our model by the kernels it was published with, from a normalised frame on the device."""
    import torch

    with torch.inference_mode():
        return setting.published.prepare(1).call


def made(case: Case | Whole, setting: Setting) -> str:
    """Makes the case ready -> why it gets no time."""
    if case.error is not None:
        case.off, tolerance = case.error(), case.slack * cases.TOLERANCE[setting.args.dtype]
        if not case.off <= tolerance:  # NaN is not
            return f"relative error {case.off:.1e}, allowed is {tolerance:.0e}: no time for a wrong result"
    if isinstance(case, Case):
        case.call = case.make()
    return ""


# ---- measuring ---------------------------------------------------------------------------------------------------


class Cpu:
    """The host's time is all the time there is."""

    has_clock = False

    def wait(self) -> None:
        pass

    def clocked(self, call: Callable) -> float:
        raise NotImplementedError

    def busy(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(lambda: None)

    def held(self) -> int:
        with open("/proc/self/statm") as file:
            return 4096 * int(file.read().split()[1])

    def profile(self, call: Callable) -> list[tuple[str, float]]:
        """Operators that reach the dispatcher."""
        from bench.worker import CountDispatched

        with CountDispatched() as counted:
            call()
        return [(name, 0.0) for name, count in counted.names.items() for _ in range(count)]


class Gpu:
    has_clock = True

    def __init__(self, device: str):
        import torch

        torch.cuda.set_device(device)
        self.torch = torch
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def wait(self) -> None:
        self.torch.cuda.current_stream().synchronize()

    def clocked(self, call: Callable) -> float:
        """Milliseconds between events around it."""
        self.begin.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end)

    @contextlib.contextmanager
    def busy(self) -> Iterator[Callable[[], None]]:
        """-> a function, called before each frame: it keeps copies to the device under way on a stream of their own."""
        torch = self.torch
        host = torch.empty(BUSY_BYTES, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(BUSY_BYTES, dtype=torch.uint8, device="cuda")
        stream, copied = torch.cuda.Stream(), torch.cuda.Event()

        def keep() -> None:
            if copied.query():
                with torch.cuda.stream(stream):
                    device.copy_(host, non_blocking=True)
                    device.copy_(host, non_blocking=True)
                    copied.record()

        yield keep
        stream.synchronize()

    def held(self) -> int:
        return self.torch.cuda.memory_reserved()

    def profile(self, call: Callable) -> list[tuple[str, float]]:
        """Kernels and copies of one call and their microseconds, those of a replayed graph too."""
        torch = self.torch
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        gpu = torch.autograd.DeviceType.CUDA
        return [(event.name, event.time_range.elapsed_us()) for event in profile.events() if event.device_type == gpu]


def measured(ready: list[Case], device: Cpu | Gpu, args: argparse.Namespace) -> None:
    """Fills in the cases' times; a turn of each before any has its next."""
    gc.collect()
    gc.disable()  # a full collection walks all of torch and would be counted as a frame's
    for start in range(0, args.frames, args.turn):
        for case in ready:
            frames = min(args.turn, args.frames - start)
            with device.busy() if case.busy else contextlib.nullcontext(lambda: None) as keep:
                turn(case, device, keep, max(1, frames // 20) if case.few else frames)
    gc.enable()


def turn(case: Case, device: Cpu | Gpu, keep: Callable[[], None], frames: int) -> None:
    for _ in range(UNCOUNTED):
        case.call()
    device.wait()
    held = device.held()
    for _ in range(frames):
        keep()
        start = time.perf_counter()
        case.call()
        device.wait()
        case.host_ms.append(1e3 * (time.perf_counter() - start))
    case.grown += device.held() - held
    for _ in range(frames if device.has_clock and len(case.device_ms) < BY_EVENTS else 0):
        keep()
        case.device_ms.append(device.clocked(case.call))


def summary(case: Case, device: Cpu | Gpu) -> dict:
    profile = device.profile(case.call)
    copies = [name for name, _ in profile if name.startswith(("Memcpy", "Memset"))]
    times: dict[str, list[float]] = {}
    for name, us in profile:
        times.setdefault(name, []).append(us)
    return {
        "host": tail(case.host_ms), "device": tail(case.device_ms), "streams": case.streams,
        "frames_per_second": round(1e3 * case.streams / tail(case.host_ms)["median"], 1),
        "error": case.off, "launches": len(profile) - len(copies), "copies": len(copies), "bytes_grown": case.grown,
        "budget": [{"name": name[:100], "count": len(us), "us": round(sum(us), 2)} for name, us in times.items()],
    }  # fmt: skip


def tail(times: list[float]) -> dict[str, float] | None:
    """Milliseconds; None where there are none."""
    import numpy as np

    if not times:
        return None
    middle, p99, p999 = (float(value) for value in np.quantile(times, (0.5, 0.99, 0.999)))
    values = {"median": middle, "p99": p99, "p99.9": p999, "max": max(times), "p99/p50": p99 / middle}
    return {name: round(value, 5) for name, value in values.items()} | {"frames": len(times)}


def line(row: dict) -> str:
    host, device = row["host"], row["device"]
    beside = f", device {device['median']:.3f}" if device else ""
    return (
        f"{row['case']:44} {host['median']:8.3f} ms (p99 {host['p99']:.3f}, p99.9 {host['p99.9']:.3f}, max "
        f"{host['max']:.3f}{beside}) {row['frames_per_second']:,.0f} frames/s, {row['launches']} launches, "
        f"{row['copies']} copies, {row['bytes_grown']} bytes grown, error {row['error']:.1e}"
    )
