"""What `python -m bench run` times: models that read one more frame, and the cores of scan and attention.

A provider that is not here is a name and a reason, never left out.  `make()` gives a subject: `error()`, its relative
error by an fp64 reference on another path, and `prepare(mark)`, what is to be timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases
from bench.machine import read
from bench.published import missing, with_published_kernels
from bench.published import scan as published_scan
from bench.vit import ViT
from bench.worker import relative_error
from endomamba.models import create_model
from endomamba.ops import backend_info, selective_scan
from endomamba.ops._backend import NAMES

CLASSES = 7
SLOW = (
    "plain PyTorch, token by token: on a GPU seconds a frame and minutes a clip; it is what the others are checked by"
)


@dataclass
class Prepared:
    """call: what is timed; rewind: back to before it, not timed; nbytes: what is carried to the next frame."""

    call: Callable[[], object]
    rewind: Callable[[], object]
    nbytes: int


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable | None  # () -> a subject
    why: str = ""  # where make is None


@dataclass(frozen=True)
class Options:
    """device: as torch names it; model: tiny, small or middle; size: of a square frame in pixels; depth: None for the
    published one; weights: None for those of inference, bf16 on a GPU and fp32 on a CPU."""

    device: str = "cpu"
    model: str = "tiny"
    size: int = 224
    depth: int | None = None
    weights: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.weights or (torch.bfloat16 if self.device.startswith("cuda") else torch.float32)

    @property
    def tolerance(self) -> float:
        """Of a whole model in bf16 twice that of an op: a plain ViT's activations alone cost it 1e-2."""
        return 2 * cases.TOLERANCE["bf16"] if self.device.startswith("cuda") else cases.TOLERANCE["fp32"]

    @property
    def width(self) -> int:
        return cases.WIDTH[self.model]

    def create(self, name: str, **more) -> torch.nn.Module:
        torch.manual_seed(0)
        if self.depth is not None:
            more["depth"] = self.depth
        return create_model(name, num_classes=CLASSES, img_size=self.size, **more)


# ---- one more frame ----------------------------------------------------------------------------------------------


def frame_providers(options: Options) -> list[Provider]:
    no_graph = "" if options.device.startswith("cuda") else "CUDA graphs need a GPU"
    vit = {"tiny": "ViT-Ti/16", "small": "ViT-S/16", "middle": "ViT/16"}[options.model]
    ours = {backend: why for backend, why in reasons(options, "mixer_inner")}
    graphed = partial(Graphed, partial(EndoMamba, options, "triton"))
    theirs, why_not = partial(Published, options), Published.missing(state=True)
    return [
        *(provider(f"EndoMamba, {name}", partial(EndoMamba, options, name), why) for name, why in ours.items()),
        provider("EndoMamba, triton, CUDA graph", graphed, no_graph or ours["triton"]),
        provider("mamba-ssm, eager", theirs, why_not),
        provider("mamba-ssm, CUDA graph", partial(Graphed, theirs), no_graph or why_not),
        provider("attention twin, KV cache", partial(Twin, options)),
        provider(f"Endo-FM window{published(options)}", partial(Window, options)),
        provider(vit, partial(Alone, options)),
        provider(f"{vit}, CUDA graph", partial(Graphed, partial(Alone, options)), no_graph),
        provider(f"{vit}, compiled, CUDA graph", partial(Graphed, partial(Compiled, options)), no_graph),
    ]


def reasons(options: Options, op: str) -> Iterator[tuple[str, str]]:
    """Every back end, and why it is not timed here, or an empty text."""
    for backend in NAMES:
        slow = backend == "reference" and options.device.startswith("cuda")
        yield backend, SLOW if slow else "; ".join(backend_info(options.device)[op][backend])


def provider(name: str, make: Callable | None, why: str = "") -> Provider:
    return Provider(name, None if why else make, why)


def published(options: Options) -> str:
    return f", width {options.width}" if options.model == "tiny" else ""


def require_memory(needed: int, device: str) -> None:
    """MemoryError where a cache would take more than half of what is free."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
    else:
        lines = read(Path("/proc/meminfo")).splitlines()
        free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2**62)
    if needed > free / 2:
        raise MemoryError(f"its cache needs {needed:,} bytes, {free:,} are free here")


class Subject:
    """A model in the benchmark's dtype, the same weights in fp64 on the reference, and two frames."""

    def __init__(self, options: Options, model: torch.nn.Module):
        self.options = options
        self.model = model.eval().to(options.device, options.dtype)
        self.wide = copy.deepcopy(self.model).double()
        for module in self.wide.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
        random = cases.Random(options.device)
        self.frames = [random.normal(1, 3, 1, options.size, options.size).to(options.dtype) for _ in range(2)]

    def error(self) -> float:
        """Of the answer to the second frame, read after the first."""
        with torch.inference_mode():
            state = self.model.init_state(1)
            self.model.step_(self.frames[0], state)
            got = self.model.step_(self.frames[1], state)[:, -1]
            return relative_error(got, [self.truth().cpu()])

    def truth(self) -> Tensor:
        """(1, k) in fp64: the clip at once, not frame by frame."""
        return self.wide(torch.cat(self.frames, 2).double())[:, -1]

    def prepare(self, mark: int) -> Prepared:
        state = self.at(mark)
        before = state.clone()
        call = partial(self.model.step_, self.frames[1], state)
        return Prepared(call, lambda: state.copy_(before), state.nbytes)

    def at(self, mark: int):
        """The state before frame `mark`, counted from 1.  It has a fixed size: one frame is read, the rest counted."""
        state = self.model.init_state(1)
        if mark > 1:
            with torch.inference_mode():
                self.model.step_(self.frames[0], state)
            state.frame.fill_(mark - 1)
        return state


class EndoMamba(Subject):
    def __init__(self, options: Options, backend: str):
        more = dict(dt_init="mamba", dt_min=1e-4, dt_max=1e-1, backend=backend)
        super().__init__(options, options.create(f"endomamba_{options.model}", **more))


class Published(EndoMamba):
    """The same weights by mamba-ssm's kernels; the norms are ours."""

    missing = staticmethod(missing)

    def __init__(self, options: Options):
        super().__init__(options, "triton")
        with_published_kernels(self.model)


class Twin(Subject):
    """Reading mark - 1 frames to fill its cache would take minutes: it is filled with those of one frame, repeated."""

    def __init__(self, options: Options):
        super().__init__(options, options.create(f"attention_twin_{options.model}"))

    def prepare(self, mark: int) -> Prepared:
        config, size = self.model.config, self.options.dtype.itemsize
        cache = 2 * mark * config.frame_tokens * config.temporal_layers * config.embed_dim * size
        require_memory(cache, self.options.device)
        state = self.model.init_state(1, reserve_frames=mark)
        if mark > 1:
            with torch.inference_mode():
                self.model.step_(self.frames[0], state)
            one, held = state.stop, state.stop * (mark - 1)
            for cache in (state.keys, state.values):
                cache[:, :, :, one:held] = cache[:, :, :, :one].repeat(1, 1, 1, mark - 2, 1)
            state.stop = held
            state.frame.fill_(mark - 1)
        stop = state.stop

        def rewind() -> None:
            state.stop = stop
            state.frame.fill_(mark - 1)

        return Prepared(partial(self.model.step_, self.frames[1], state), rewind, state.nbytes)


class Window(Subject):
    """Eight frames, all read again for each new one.  Published sizes, but with model="tiny" as wide as the others."""

    def __init__(self, options: Options):
        sizes = {"embed_dim": options.width, "num_heads": options.width // 64} if options.model == "tiny" else {}
        super().__init__(options, options.create("endofm", **sizes))

    def truth(self) -> Tensor:
        first, second = self.frames
        return self.wide(torch.cat([first] * (self.model.config.num_frames - 1) + [second], 2).double())


class Alone(Subject):
    """A ViT carries nothing.  Its reference is itself in fp64."""

    def __init__(self, options: Options):
        torch.manual_seed(0)
        depth = {} if options.depth is None else {"depth": options.depth}
        super().__init__(options, ViT(options.width, options.size, CLASSES, **depth))

    def error(self) -> float:
        with torch.inference_mode():
            return relative_error(self.model(self.frames[1]), [self.wide(self.frames[1].double()).cpu()])

    def prepare(self, mark: int) -> Prepared:
        return Prepared(partial(self.model, self.frames[1]), lambda: None, 0)


class Compiled(Alone):
    """By torch.compile, every product by the fastest of its choices."""

    def __init__(self, options: Options):
        super().__init__(options)
        self.model = torch.compile(self.model, mode="max-autotune-no-cudagraphs", fullgraph=True)


class Graphed:
    """Another subject's call, captured.  Its error is that of a replay."""

    def __init__(self, make: Callable):
        self.inner = make()

    def error(self) -> float:
        with torch.inference_mode():
            eager, graph = self.inner.prepare(2), self.prepare(2)
            graph.rewind()
            return max(self.inner.error(), relative_error(graph.call(), [eager.call().cpu().double()]))

    def prepare(self, mark: int) -> Prepared:
        prepared = self.inner.prepare(mark)
        return Prepared(captured(prepared.call), prepared.rewind, prepared.nbytes)


def captured(call: Callable) -> Callable:
    """The call as a CUDA graph, after two on a side stream, which may still compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


# ---- tokens ------------------------------------------------------------------------------------------------------


def token_providers(options: Options) -> list[Provider]:
    """The core of a causal layer on one sequence, projections left out: the gated scan, and attention."""
    return [
        *(
            provider(f"scan, {name}", partial(Scan, options, name), why)
            for name, why in reasons(options, "selective_scan")
        ),
        provider("mamba-ssm, scan", partial(PublishedScan, options), Published.missing()),
        provider("causal attention, SDPA", partial(Attention, options)),
    ]


class Scan:
    def __init__(self, options: Options, backend: str):
        self.options, self.backend = options, backend

    def run(self, tokens: int, backend: str, dtype: torch.dtype | None = None):
        dtypes = {torch.bfloat16: "bf16", torch.float32: "fp32"}
        values = cases.scan_inputs(self.options.device, dtypes[self.options.dtype], self.options.model, tokens)
        if dtype is not None:
            values = {name: value.to(dtype) for name, value in values.items()}
        return partial(selective_scan, **values, backend=backend)

    def error(self) -> float:
        with torch.inference_mode():
            truth = self.run(197, "reference", torch.float64)()[0].cpu()
            return relative_error(self.run(197, self.backend)()[0], [truth])

    def prepare(self, mark: int) -> Prepared:
        return Prepared(self.run(mark, self.backend), lambda: None, 0)


class PublishedScan(Scan):
    """mamba-ssm's, its operands in its own layout before the clock starts."""

    def __init__(self, options: Options):
        super().__init__(options, "reference")

    def run(self, tokens: int, backend: str, dtype: torch.dtype | None = None):
        run = super().run(tokens, backend, dtype)
        if dtype is not None:
            return run
        values = run.keywords
        x, dt, z = (values[name].mT.contiguous() for name in ("x", "dt", "z"))
        B, C = (values[name].mT.contiguous().unsqueeze(1) for name in ("B", "C"))
        inputs = x, dt, values["A"], B, C, values["D"], z, values["dt_bias"], None
        return lambda: (published_scan(*inputs).mT,)


class Attention:
    """softmax(q k^T) v, causal, heads of 64 channels, of the model's width."""

    def __init__(self, options: Options):
        self.options = options

    def inputs(self, tokens: int) -> list[Tensor]:
        random, heads = cases.Random(self.options.device), self.options.width // 64
        return [random.normal(1, heads, tokens, 64).to(self.options.dtype) for _ in range(3)]

    def error(self) -> float:
        q, k, v = self.inputs(197)
        scores = q.double() @ k.double().mT / 8
        hidden = torch.ones(197, 197, dtype=torch.bool, device=q.device).triu(1)
        truth = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.double()
        return relative_error(F.scaled_dot_product_attention(q, k, v, is_causal=True), [truth.cpu()])

    def prepare(self, mark: int) -> Prepared:
        return Prepared(partial(F.scaled_dot_product_attention, *self.inputs(mark), is_causal=True), lambda: None, 0)
