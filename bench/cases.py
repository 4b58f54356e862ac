"""The shapes of every benchmark, from the models, and the cases that the regression gate compares.

Tokens: 1 (a step of one token), 49 (a frame of 112 pixels), 197 (one of 224, with its class token), 784 and 3152 (16
frames of 49 and of 197).  Channels: those of the scan, twice the model's width.

`cases(device)` is the protocol of a case file; a file of your own needs nothing else (bench/README.md).
"""

from __future__ import annotations

from functools import partial

TOKENS = (1, 49, 197, 784, 3152)
WIDTH = {"tiny": 192, "small": 384, "middle": 576}
CHANNELS = {"tiny": 384, "small": 768, "middle": 1152}
STATES = 16

# (sequences, tokens) of training on a GPU, small model
BOTH_WAYS = ((768, 49), (768, 197), (128, 197), (16, 197), (48, 3137))
CAUSAL = ((48, 784), (48, 3152), (1, 3152))
LAUNCH_CHOICES = ((768, 49), (48, 784), (128, 197), (1, 3152))
OTHER = (  # channels, states, dtype
    (384, 16, "bf16"), (1152, 16, "bf16"), (768, 8, "bf16"), (768, 64, "bf16"), (768, 16, "fp32"), (768, 16, "fp16"),
)  # fmt: skip
ON_A_CPU = {  # (sequences, tokens, channels, states)
    "one frame, small": (1, 197, CHANNELS["small"], STATES),
    "16 frames spatial, small": (16, 197, CHANNELS["small"], STATES),
    "16 frames temporal, small": (1, 3152, CHANNELS["small"], STATES),
    "one frame, tiny": (1, 197, CHANNELS["tiny"], STATES),
}

TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2}  # relative error in norm


def cases(device: str) -> list[dict]:
    """The gate's cases: every op at every number of tokens of the small model, the other models at one frame."""
    gpu = device.startswith("cuda")
    backend, dtype = ("triton", "bf16") if gpu else ("cpu", "fp32")
    sizes = [("small", tokens) for tokens in TOKENS] + [("tiny", 197), ("middle", 197)]
    found = []
    for op, make in OPS.items():
        for model, tokens in sizes:
            if op == "frame" and (tokens not in (49, 197) or model == "middle"):
                continue  # its reference in fp64 takes a quarter of a minute
            found.append({
                "op": op, "shape": f"{model}-l{tokens}-{dtype}", "backend": backend, "tolerance": TOLERANCE[dtype],
                "make": partial(make, device, backend, dtype, model, tokens),
                "instructions": op != "frame" and tokens <= 197,  # longer ones run the same code
            })  # fmt: skip
    return found


class Random:
    """Seeded numbers on the CPU, the same on every device, then moved."""

    def __init__(self, device: str):
        import torch

        self.torch, self.device, self.generator = torch, device, torch.Generator().manual_seed(0)

    def normal(self, *shape):
        return self.torch.randn(*shape, generator=self.generator).to(self.device)

    def uniform(self, low: float, high: float, *shape):
        return (low + (high - low) * self.torch.rand(*shape, generator=self.generator)).to(self.device)


def scan_inputs(device: str, dtype: str, model: str, tokens: int, side: str = "") -> dict:
    """Time steps of 0.002 to 0.13, so that a state outlives many tokens."""
    import torch

    random, d = Random(device), CHANNELS[model]
    half = torch.bfloat16 if dtype == "bf16" else torch.float32
    rates = torch.arange(1, STATES + 1, device=device).float()
    values = {
        "x": random.normal(1, tokens, d).to(half), "dt": (0.5 * random.normal(1, tokens, d)).to(half),
        "A": -rates * random.uniform(0.5, 1.5, d, STATES), "B": random.normal(1, tokens, STATES).to(half),
        "C": random.normal(1, tokens, STATES).to(half), "D": random.normal(d),
        "dt_bias": random.uniform(-6, -2, d),
    }  # fmt: skip
    return {name + side: value for name, value in values.items()} | {"z": random.normal(1, tokens, d).to(half)}


def against_reference(function, values: dict, backend: str):
    """(call, truth) of an inference call: our back end, and the reference in fp64."""
    import torch

    def call():
        with torch.inference_mode():
            return function(**values, backend=backend)

    def truth():
        with torch.inference_mode():
            return function(**{name: value.double() for name, value in values.items()}, backend="reference")

    return call, truth


def make_scan(device, backend, dtype, model, tokens):
    from endomamba.ops import selective_scan

    values = scan_inputs(device, dtype, model, tokens)
    return against_reference(selective_scan, values, backend)


def make_scan_training(device, backend, dtype, model, tokens):
    """Forward and backward: y and every gradient."""
    import torch

    from endomamba.ops import selective_scan

    values = scan_inputs(device, dtype, model, tokens)
    dy = torch.ones_like(values["x"])

    def run(inputs, backend):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        y = selective_scan(**leaves, backend=backend)[0]
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))

    return lambda: run(values, backend), lambda: run({k: v.double() for k, v in values.items()}, "reference")


def make_both_ways(device, backend, dtype, model, tokens):
    from endomamba.ops import bidirectional_scan

    values = scan_inputs(device, dtype, model, tokens) | scan_inputs(device, dtype, model, tokens, "_b")
    return against_reference(bidirectional_scan, values, backend)


def make_conv(device, backend, dtype, model, tokens):
    from endomamba.ops import causal_conv1d

    random, d = Random(device), CHANNELS[model]
    x = scan_inputs(device, dtype, model, tokens)["x"]
    values = {"x": x, "weight": random.normal(d, 4), "bias": random.normal(d)}
    return against_reference(lambda **given: causal_conv1d(**given, activation="silu"), values, backend)


def make_norm(device, backend, dtype, model, tokens):
    from endomamba.ops import add_rms_norm

    random, c = Random(device), WIDTH[model]
    x = random.normal(1, tokens, c)
    values = {"x": x.bfloat16() if dtype == "bf16" else x, "weight": random.normal(c)}
    return against_reference(add_rms_norm, values | {"residual": random.normal(1, tokens, c)}, backend)


def make_frame(device, backend, dtype, model, tokens):
    """One frame through the model with the state of the one before: what a stream does for each."""
    import torch

    from endomamba.models import create_model

    size = {49: 112, 197: 224}[tokens]
    options = dict(num_classes=7, img_size=size, dt_init="mamba", dt_min=1e-4, dt_max=1e-1)

    def run(dtype, backend):
        torch.manual_seed(0)
        net = create_model(f"endomamba_{model}", backend=backend, **options).eval().to(device, dtype)
        frames = Random(device).normal(2, 1, 3, 1, size, size).to(dtype)
        with torch.inference_mode():
            _, state = net.step(frames[0], net.init_state(1))

        def call():
            with torch.inference_mode():
                return net.step(frames[1], state)[0]

        return call

    half = torch.bfloat16 if dtype == "bf16" else torch.float32
    return run(half, backend), lambda: run(torch.float64, "reference")()


OPS = {
    "selective_scan": make_scan,
    "selective_scan_training": make_scan_training,
    "bidirectional_scan": make_both_ways,
    "causal_conv1d": make_conv,
    "add_rms_norm": make_norm,
    "frame": make_frame,
}


def about() -> dict:
    """What of the build a reader of the result wants to know."""
    from endomamba.ops._extension import MISSING, C

    return {"instruction set": C.level() if C else MISSING}
