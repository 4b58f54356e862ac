"""Training where numbers are extreme or coarse: any dt, activations near fp16's end, bf16 and fp16 for many steps."""

import pytest
import torch
import torch.nn.functional as F

from endomamba.ops import add_layer_norm, add_rms_norm, bidirectional_scan, causal_conv1d, selective_scan
from tests.accuracy import assert_as_accurate_as_eager
from tests.models.common import TINY, awake, seeded
from tests.ops import backends as on
from tests.ops.backends import DEVICE, DTYPES, Random

FP16_MAX = torch.finfo(torch.float16).max


def outputs_and_gradients(function, inputs, upstream):
    """Every output and gradient by name; inputs that are None stay so."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = [y for y in function(**inputs) if y is not None]
    grads = torch.autograd.grad(outputs, list(inputs.values()), [u.to(y.dtype) for u, y in zip(upstream, outputs)])
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"gradient of {name}": g for name, g in zip(inputs, grads)}


def assert_right(function, inputs, upstream, backend, slack=2.0):
    """Finite, and as accurate as the reference in the inputs' dtypes, judged by the reference in fp64."""
    got, eager = (outputs_and_gradients(function(b), inputs, upstream) for b in (backend, "reference"))
    doubles = {name: t.double() for name, t in inputs.items()}
    truth = outputs_and_gradients(function("reference"), doubles, [u.double() for u in upstream])
    for name, t in got.items():
        assert truth[name].isfinite().all() and t.isfinite().all(), f"{name} is not finite"
        assert truth[name].any(), f"{name} is zero: nothing is tested"
        assert_as_accurate_as_eager(name, t, eager[name], truth[name], slack)


# ---- dt from -30 (a token that changes nothing: softplus gives 9e-14) to 50 (one that erases the state: exp(-800))


def scan_inputs(dtype, b=2, l=70, d=6, n=16):
    random = Random(l)
    randn = random.randn
    dt = random.rand(b, l, d) * 80 - 30
    dt[:, :4] = torch.tensor([-30.0, 50.0, 20.0, 0.0])[:, None]
    low = {"x": randn(b, l, d), "dt": dt, "B": randn(b, l, n), "C": randn(b, l, n), "z": randn(b, l, d)}
    wide = {"A": -torch.arange(1.0, n + 1).repeat(d, 1), "D": randn(d), "dt_bias": randn(d)}
    return {name: t.to(dtype) for name, t in low.items()} | wide


@on.backends("selective_scan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_selective_scan_of_any_dt(backend, dtype, reverse):
    inputs = scan_inputs(DTYPES[dtype])
    random = Random(1)
    inputs["initial_state"] = random.randn(2, 6, 16)
    upstream = [random.randn(2, 70, 6), random.randn(2, 6, 16)]

    def scan(backend):
        return lambda **t: selective_scan(**t, reverse=reverse, return_final_state=True, backend=backend)

    assert_right(scan, inputs, upstream, backend)


@on.backends("bidirectional_scan")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bidirectional_scan_of_any_dt(backend, dtype):
    inputs, other = scan_inputs(DTYPES[dtype]), scan_inputs(DTYPES[dtype])
    inputs |= {f"{name}_b": t.flip(0) for name, t in other.items() if name != "z"}
    upstream = [Random(1).randn(2, 70, 6)]
    assert_right(lambda backend: lambda **t: bidirectional_scan(**t, backend=backend), inputs, upstream, backend)


# ---- fp16 as far as it goes


def extremes(*shape):
    """fp16 from -65,504 to 65,504, both ends among them."""
    t = (Random(3).rand(*shape) * 2 - 1) * FP16_MAX
    t.view(-1)[:2] = torch.tensor([FP16_MAX, -FP16_MAX])
    return t.half()


@on.backends("add_rms_norm")
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_norm_at_the_end_of_fp16(backend, layer):
    random = Random(4)
    inputs = {"x": extremes(2, 5, 96), "weight": random.rand(96) + 0.5}
    inputs["residual"] = random.randn(2, 5, 96) * 1e5
    if layer:
        inputs["bias"] = random.randn(96)
    upstream = [random.randn(2, 5, 96), random.randn(2, 5, 96)]
    norm = add_layer_norm if layer else add_rms_norm
    assert_right(lambda backend: lambda **t: norm(**t, backend=backend), inputs, upstream, backend)


@on.backends("causal_conv1d")
def test_conv_at_the_end_of_fp16(backend):
    """Sums of three terms of 65,504 each pass the end on the way; silu of -65,504 is zero."""
    random = Random(5)
    inputs = {"x": extremes(2, 9, 24), "weight": torch.tensor([1.0, -1.0, 0.5, 0.25]).repeat(24, 1)}
    inputs["x"][:, 3:6] = FP16_MAX  # 65,504 * (1 - 1 + 0.5 + 0.25)
    inputs["weight"] *= random.rand(24, 1) * 0.3 + 0.05
    inputs["bias"] = random.randn(24)
    upstream = [random.randn(2, 9, 24) * 1e-2]
    conv = lambda backend: lambda **t: causal_conv1d(**t, activation="silu", backend=backend)  # noqa: E731
    assert_right(conv, inputs, upstream, backend)


@on.backends("selective_scan")
def test_scan_at_the_end_of_fp16(backend):
    """x and z up to the end of fp16, states far beyond it, y within."""
    inputs = scan_inputs(torch.float16)
    inputs["x"], inputs["z"] = extremes(2, 70, 6), extremes(2, 70, 6)
    inputs["dt"] = inputs["dt"].clamp(-30, 4)
    inputs["C"] *= 1e-6  # subnormal in fp16
    inputs["D"] *= 1e-6
    inputs["B"] *= 1e-1
    upstream = [Random(6).randn(2, 70, 6) * 1e-6]
    assert_right(lambda backend: lambda **t: selective_scan(**t, backend=backend)[:1], inputs, upstream, backend)


# ---- a task that needs memory: the answer at a frame is what the frame before it showed


def task(random, b=8, t=4, classes=3):
    """(b, 3, t, 16, 16) in which every frame is one of three textures under noise, and (b, t) labels."""
    shown = random.randint(classes, b, t)
    textures = Random(7).randn(classes, 3, 16, 16)
    video = textures[shown].transpose(1, 2) + 0.3 * random.randn(b, 3, t, 16, 16)
    return video, torch.cat((shown[:, :1], shown[:, :-1]), 1)


def train(model, steps, dtype=None, scaled=False, lr=3e-3):
    """-> the loss of every step, and how many steps the scaler left out."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scaler = torch.amp.GradScaler(DEVICE, enabled=scaled)
    random, losses, scales = Random(8), [], []
    for _ in range(steps):
        video, labels = task(random)
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(video).flatten(0, 1).float(), labels.flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        losses.append(loss.detach())
    skipped = sum(after < before for before, after in zip(scales, [*scales[1:], scaler.get_scale()]))
    return torch.stack(losses).cpu(), skipped


def assert_learned(losses, model):
    """Down to less than a third of knowing nothing, which is log(3) = 1.1."""
    assert losses.isfinite().all(), f"the loss is not finite at step {(~losses.isfinite()).nonzero()[0].item()}"
    assert losses[-10:].mean() < 0.35, f"the loss fell from {losses[0]:.2f} to {losses[-10:].mean():.2f} only"
    assert all(p.isfinite().all() for p in model.parameters())


def student(**options):
    return awake(seeded(**{**TINY, "embed_dim": 32, "dt_init": "mamba", **options}))


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_bf16_autocast_learns(use_checkpoint):
    model = student(use_checkpoint=use_checkpoint)
    losses, _ = train(model, 60, torch.bfloat16)
    assert_learned(losses, model)


def test_bf16_weights_learn():
    """The vectors that stay fp32 move by steps that bf16 would lose; after the cast as before it they are exact."""
    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    losses, _ = train(model, 60)
    assert_learned(losses, model)
    small_steps = 0
    for name, p in model.named_parameters():
        if name.endswith(("A_log", "A_b_log", ".D", ".D_b", "norm.weight")):
            moved = p.detach() != before[name]
            assert moved.float().mean() > 0.9, name
            small_steps += (moved & (p.detach().bfloat16() == before[name].bfloat16())).sum().item()
    assert small_steps > 0, "every step could have been taken in bf16: this test could not fail"


def test_fp16_autocast_with_a_scaler_learns():
    model = student()
    losses, skipped = train(model, 60, torch.float16, scaled=True)
    assert_learned(losses, model)
    assert skipped <= 5, f"the scaler left out {skipped} of 60 steps"


@pytest.mark.skipif(DEVICE == "cpu", reason="2,000 steps take minutes on a CPU; the 60 of the test above run there")
def test_fp16_autocast_with_a_scaler_for_2000_steps():
    model = student()
    losses, skipped = train(model, 2000, torch.float16, scaled=True, lr=1e-3)
    assert_learned(losses, model)
    assert skipped <= 20, f"the scaler left out {skipped} of 2,000 steps"
