"""The architecture, its initialisation, heads, sizes, precision, memory, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from endomamba.models import (
    ClassificationHead,
    EndoMambaConfig,
    PhaseHead,
    create_model,
    list_models,
    register_model,
)
from endomamba.models import endomamba as endomamba_module
from endomamba.models.layers import DropPath, SpatialBlock, TemporalBlock, resize_positions
from tests.models.common import BACKENDS, TINY, assert_close, awake, long_memory, make_video
from tests.ops.backends import DEVICE


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---- the three published sizes


@pytest.mark.parametrize(
    "name, depth, bare, with_head, keys, encoder",
    [
        ("endomamba_tiny", 24, 6_590_976, 6_592_327, 331, 6_590_592),
        ("endomamba_small", 24, 24_462_336, 24_465_031, 331, 24_461_568),
        ("endomamba_middle", 32, 71_299_584, 71_303_623, 439, 71_298_432),
    ],
)
def test_published_sizes(name, depth, bare, with_head, keys, encoder):
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
        assert parameters(create_model(name)) == bare
        assert parameters(create_model(name, with_cls_token=False)) == encoder
    assert parameters(model) == with_head
    assert len(model.state_dict()) == keys
    kinds = [type(block) for block in model.layers]
    assert kinds == [SpatialBlock] * (depth // 2) + [TemporalBlock] * (depth // 2)


def test_published_names_and_shapes():
    with torch.device("meta"):
        model = create_model("endomamba_small", num_classes=7)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 1, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm_f.weight": (384,),
        "head.weight": (7, 384),
        "head.bias": (7,),
    }
    direction = {
        "conv1d{}.weight": (768, 1, 4),
        "conv1d{}.bias": (768,),
        "x_proj{}.weight": (56, 768),
        "dt_proj{}.weight": (768, 24),
        "dt_proj{}.bias": (768,),
        "A{}_log": (768, 16),
        "D{}": (768,),
    }
    for i in range(24):
        expected |= {f"layers.{i}.norm.weight": (384,), f"layers.{i}.mixer.in_proj.weight": (1536, 384)}
        expected[f"layers.{i}.mixer.out_proj.weight"] = (384, 768)
        for side in ("", "_b") if i < 12 else ("",):
            expected |= {f"layers.{i}.mixer.{key.format(side)}": shape for key, shape in direction.items()}
    assert shapes == expected


# ---- initialisation


def test_published_init():
    torch.manual_seed(0)
    model = create_model("endomamba", img_size=64, embed_dim=64, depth=4, num_classes=5)
    inner = 128
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if name == "cls_token" or (isinstance(module, nn.Linear) and name.endswith("bias")):
            assert not p.any(), name
        elif "A_" in name:
            assert torch.equal(p, torch.arange(1, 17).float().log().expand(inner, 16)), name
        elif name.endswith((".D", ".D_b", "norm.weight", "norm_f.weight")):
            assert (p == 1).all(), name
        elif "conv1d" in name:
            assert 0.4 < p.abs().max() <= 0.5, name
        elif name.endswith("out_proj.weight"):
            limit = (
                1 / math.sqrt(inner) / math.sqrt(4)
            )  # kaiming_uniform(a=sqrt 5) is U(+-fan_in^-0.5), over sqrt(depth)
            assert 0.98 * limit < p.abs().max() <= limit, name
        elif "patch_embed" in name:
            assert p.abs().max() <= 768**-0.5, name
        else:
            assert 0.017 < p.std() < 0.023 and p.abs().max() <= 2, name


def test_mamba_dt_init():
    """dt = softplus(bias) is log-uniform in [dt_min, dt_max], both ways, in every block; nothing else differs."""
    torch.manual_seed(0)
    options = {"embed_dim": 64, "depth": 4, "img_size": 32}
    model = create_model("endomamba", dt_init="mamba", dt_min=1e-4, dt_max=1e-1, **options)
    torch.manual_seed(0)
    published = create_model("endomamba", **options)
    dts = []
    for name, p in model.named_parameters():
        if "dt_proj" not in name:
            assert torch.equal(p, published.get_parameter(name)), name
        elif name.endswith("bias"):
            dt = nn.functional.softplus(p.double())
            assert 0.99e-4 < dt.min() < 2e-4 and 5e-2 < dt.max() < 1.01e-1, name
            dts.append(dt.log())
        else:
            assert 0.45 < p.abs().max() <= 0.5, name  # r = 4
    assert len(dts) == 6
    assert abs(torch.cat(dts).mean() - (math.log(1e-4) + math.log(1e-1)) / 2) < 0.2


def test_drop_path_schedule():
    """Block i drops the output of block i - 1: nothing in block 0, the last linspace value is never used."""
    model = create_model("endomamba", **TINY | {"depth": 6, "drop_path_rate": 0.1})
    assert [block.drop_path.rate for block in model.layers] == pytest.approx([0, 0, 0.02, 0.04, 0.06, 0.08])
    assert create_model("endomamba", **TINY | {"depth": 1}).layers[0].drop_path.rate == 0


def test_drop_path_drops_rows():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    scale = drop(torch.zeros(4000, 1))
    assert scale.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((scale == 0).float().mean() - 0.25) < 0.03
    assert drop.eval()(torch.zeros(4, 1)) is None


def test_drop_path_drops_frames_in_space_and_clips_in_time(monkeypatch):
    rows = []
    monkeypatch.setattr(DropPath, "forward", lambda self, x: rows.append(x.shape[0]) or torch.zeros(x.shape[0]))
    model = long_memory()
    hidden, residual = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    for block in (model.layers[0], model.layers[3]):
        assert torch.equal(block(hidden, residual)[1], residual)  # everything was dropped
    assert rows == [2 * 3, 2]


# ---- heads


def test_phase_heads():
    video = make_video(long_memory())
    for head in ("mean", "cls"):
        model = long_memory(head=head)
        assert isinstance(model.head, PhaseHead)
        features = model.forward_features(video)
        assert features.shape == (1, 4, 5, 16)
        pooled = features.mean(2) if head == "mean" else features[:, :, 0]
        assert_close(head, model(video), pooled @ model.head.weight.T + model.head.bias, 1e-6)
        with pytest.raises(ValueError, match=r"no classification head; create it with head='classification'"):
            model.classify(video)


def test_classification_head():
    """One Linear on the mean over frames of cls; the logits of single frames are what it is the mean of."""
    model = long_memory(head="classification")
    assert isinstance(model.head, ClassificationHead)
    video = make_video(model, b=2)
    cls = model.forward_features(video)[:, :, 0]
    clip = model.classify(video)
    assert clip.shape == (2, 3)
    assert_close("clip", clip, cls.mean(1) @ model.head.weight.T + model.head.bias, 1e-6)
    assert_close("mean of frames", model(video).mean(1), clip, 1e-6)


def test_no_head_gives_the_pooled_features():
    model = long_memory(num_classes=0)
    assert not any(name.startswith("head") for name in model.state_dict())
    video = make_video(model)
    assert_close("pooled", model(video), model.forward_features(video).mean(2), 1e-6)
    out, _ = model.step(video, model.init_state(1))
    assert_close("streamed", out, model(video), 1e-6)


def test_taps_are_raw_mixer_outputs():
    model = long_memory(depth=6)
    seen = {}
    for i, block in enumerate(model.layers):
        block.mixer.register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
    features, taps = model.forward_intermediates(make_video(model, b=2, t=3))
    assert len(taps) == 3
    for tap, i in zip(taps, (2, 4, 5)):
        assert tap.shape == features.shape == (2, 3, 5, 16)
        assert torch.equal(tap.flatten(), seen[i].flatten())


# ---- which tokens see which


@pytest.mark.parametrize("backend", BACKENDS)
def test_spatial_blocks_read_both_ways(backend):
    """cls is the first token: in a forward scan alone nothing of its own frame would reach it."""
    model = long_memory(backend=backend, depth=1, num_spatial_layers=1)
    video = make_video(model, t=2)
    changed = video.clone()
    changed[:, :, 1, -1, -1] += 1  # one pixel in the last patch of frame 1
    with torch.no_grad():
        before, after = model.forward_features(video), model.forward_features(changed)
    assert torch.equal(before[:, 0], after[:, 0]), "a frame leaked into another in a spatial block"
    assert (before[:, 1, 0] - after[:, 1, 0]).abs().max() > 1e-4


def test_the_temporal_position_is_not_added_to_cls():
    model = long_memory()
    tokens = model._embed(torch.zeros(1, 3, 2, 16, 16), torch.tensor([0, 5]))
    assert torch.equal(tokens[0, 0, 0], tokens[0, 1, 0])
    assert (tokens[0, 0, 1:] - tokens[0, 1, 1:]).abs().amax(-1).min() > 0.1


def test_the_patch_embedding_is_the_convolution():
    model = create_model("endomamba", img_size=(16, 24), patch_size=8, embed_dim=16, depth=1, num_spatial_layers=0)
    video = make_video(model, b=2, t=3)
    conv = model.patch_embed.proj(video).flatten(3).permute(0, 2, 3, 1)
    assert_close("patches", model.patch_embed(video), conv, 1e-5)


# ---- sizes


def test_rectangular_frames():
    model = long_memory(img_size=(16, 40))
    assert model.pos_embed.shape == (1, 1 + 2 * 5, 16)
    assert model(make_video(model)).shape == (1, 4, 3)


def test_dynamic_image_size():
    model = long_memory(dynamic_img_size=True)
    video = torch.randn(1, 3, 2, 24, 32)
    fixed = long_memory(img_size=(24, 32))
    weights = dict(model.state_dict())
    weights["pos_embed"] = resize_positions(model.pos_embed.detach(), (2, 2), (3, 4))
    fixed.load_state_dict(weights)
    assert_close("logits", model(video), fixed(video), 1e-6)
    assert model(make_video(model)).shape == (1, 4, 3)


def test_resize_positions():
    pos = torch.randn(1, 1 + 6, 4)
    assert resize_positions(pos, (2, 3), (2, 3)) is pos
    constant = torch.cat((pos[:, :1], torch.full((1, 6, 4), 3.0)), 1)
    resized = resize_positions(constant, (2, 3), (5, 4))
    assert resized.shape == (1, 21, 4)
    assert torch.equal(resized[:, 0], pos[:, 0]) and torch.allclose(resized[:, 1:], torch.tensor(3.0))
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1)  # grows along the row, the same in all rows
    rows = resize_positions(ramp, (8, 8), (8, 16)).view(8, 16)
    assert (rows.diff(dim=1) > 0).all() and (rows - rows[0]).abs().max() < 1e-5


def test_no_cls_token():
    model = long_memory(with_cls_token=False)
    assert "cls_token" not in model.state_dict() and model.pos_embed.shape == (1, 4, 16)
    assert model.forward_features(make_video(model)).shape == (1, 4, 4, 16)


@pytest.mark.parametrize("spatial", [0, 1, 4])
def test_any_number_of_spatial_layers(spatial):
    model = long_memory(num_spatial_layers=spatial)
    video = make_video(model)
    out, state = model.step(video, model.init_state(1))
    assert state.ssm.shape[0] == 4 - spatial
    assert_close("step", out, model(video), 1e-6)


# ---- precision and training


def test_autocast_keeps_residual_and_state_in_fp32():
    model = long_memory()
    video = make_video(model)
    residuals = []
    for block in model.layers:
        block.register_forward_hook(lambda module, args, out: residuals.append((out[0].dtype, out[1].dtype)))
    with torch.no_grad():
        exact = model(video)
        residuals.clear()
        with torch.autocast(DEVICE, torch.bfloat16):
            out, state = model(video), model.step(video, model.init_state(1))[1]
    assert residuals[:4] == [(torch.bfloat16, torch.float32)] * 4
    assert state.ssm.dtype == state.conv.dtype == torch.float32
    assert 1e-5 < (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_training_and_eval_agree_without_dropout():
    model = long_memory(drop_path_rate=0.0)
    video = make_video(model)
    with torch.no_grad():
        assert torch.equal(model.train()(video), model.eval()(video))


def test_drop_path_acts_in_training_only():
    model = long_memory(drop_path_rate=0.5)
    video = make_video(model)
    with torch.no_grad():
        assert torch.equal(model(video), model(video))
        model.train()
        torch.manual_seed(0)
        assert len({model(video).sum().item() for _ in range(8)}) > 1


def gradients_and_calls(switch, autocast):
    model = long_memory(use_checkpoint=switch == "config", drop_path_rate=0.4).train()
    if switch == "attribute":
        model.gradient_checkpointing = True
    calls, saved = [], 0

    def pack(t):
        nonlocal saved
        saved += t.numel()
        return t

    for block in model.layers:
        block.norm.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)  # the same rows are dropped, in the recomputation too
    video = make_video(model, b=4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        loss = model(video[:, :, :2]).float().square().sum()
        out, _ = model.step(video[:, :, 2:], model.init_state(4))
        loss = loss + out.float().square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], len(calls), saved


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("switch", ["config", "attribute"])
def test_gradient_checkpointing_recomputes(switch, autocast):
    """The published code stores the flag and never uses it."""
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast)
    plain, calls, saved = gradients_and_calls(None, autocast)
    again, calls_again, saved_again = gradients_and_calls(switch, autocast)
    assert calls == 8 and calls_again == 16, "every block runs once more in backward"
    assert saved_again < saved / 2, f"saves {saved_again} numbers instead of {saved}"
    for got, expected in zip(again, plain):
        assert torch.equal(got, expected)


def test_gradient_checkpointing_leaves_inference_alone():
    model = long_memory(use_checkpoint=True)
    calls = []
    model.layers[0].norm.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(make_video(model))
    assert len(calls) == 1


def test_a_few_steps_of_training_learn():
    torch.manual_seed(0)
    model = awake(create_model("endomamba", **TINY, drop_path_rate=0.0)).train()
    video, labels = make_video(model, b=2), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(video).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3, losses


# ---- names and refusals


def test_registry():
    assert list_models("endomamba_*") == ["endomamba_middle", "endomamba_small", "endomamba_tiny"]
    assert "endomamba" in list_models()
    with pytest.raises(ValueError, match=r"no model is named 'endomamba_huge'; there are .*, endomamba_middle, "):
        create_model("endomamba_huge")
    with pytest.raises(ValueError, match="a model named 'endomamba_tiny' already"):
        register_model(endomamba_module.endomamba_tiny)


def test_config_is_frozen_and_comparable():
    config = create_model("endomamba", **TINY).config
    assert config.img_size == (16, 16) and config == EndoMambaConfig(**TINY)
    assert dataclasses.replace(config, embed_dim=32).rank == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": 20}, "img_size must be a multiple of patch_size=8, got 20 x 20"),
        ({"img_size": (16, 20)}, "img_size must be a multiple of patch_size=8, got 16 x 20"),
        ({"img_size": "big"}, r"img_size must be an int or \(height, width\), got 'big'"),
        ({"img_size": 0}, "img_size must be an integer of at least 1, got 0"),
        ({"embed_dim": 15}, "embed_dim must be even"),
        ({"embed_dim": 0}, "embed_dim must be an integer of at least 1, got 0"),
        ({"depth": 2.5}, "depth must be an integer of at least 1, got 2.5"),
        ({"num_spatial_layers": 5}, "num_spatial_layers must not exceed depth=4, got 5"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"dt_rank": 0}, "dt_rank must be an integer of at least 1, got 0"),
        ({"head": "max"}, "head must be one of .*, got 'max'"),
        ({"dt_init": "random"}, "dt_init must be one of .*, got 'random'"),
        ({"backend": "gpu"}, "backend must be one of .*, got 'gpu'"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"dt_min": 0.2}, "needs 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        (
            {"with_cls_token": False, "head": "cls"},
            "head='cls' reads the cls token, which with_cls_token=False removes",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=f"EndoMambaConfig: {message}"):
        create_model("endomamba", **TINY | options)


def test_unknown_option():
    with pytest.raises(TypeError, match="unexpected keyword argument 'layers'"):
        create_model("endomamba", layers=3)


@pytest.mark.parametrize(
    "video, message",
    [
        (
            torch.zeros(1, 3, 2, 24, 16),
            r"video must be \(b, 3, t, 16, 16\) with t >= 1, got \(1, 3, 2, 24, 16\); resize",
        ),
        (torch.zeros(1, 1, 2, 16, 16), r"video must be \(b, 3, t, 16, 16\) with t >= 1, got \(1, 1, 2, 16, 16\)$"),
        (torch.zeros(1, 3, 0, 16, 16), r"video must be \(b, 3, t, 16, 16\) with t >= 1, got \(1, 3, 0, 16, 16\)$"),
        (torch.zeros(3, 2, 16, 16), r"video must be \(b, 3, t, 16, 16\) with t >= 1, got \(3, 2, 16, 16\)$"),
        (torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8), "video must be normalised floating point, got torch.uint8$"),
        (torch.zeros(1, 3, 2, 16, 16, device="meta"), f"video is on meta, the model on {DEVICE}"),
    ],
    ids=["size", "channels", "frames", "ndim", "dtype", "device"],
)
def test_wrong_video(video, message):
    model = long_memory()
    state = model.init_state(max(1, video.shape[0]))
    with torch.no_grad():
        for call in (model, lambda v: model.step(v, state), lambda v: model.step_(v, state)):
            with pytest.raises(ValueError, match=f"EndoMamba: {message}") as error:
                call(video)
            assert "\n" not in str(error.value)
    assert state.frame.eq(0).all() and not state.ssm.any()


def test_wrong_dynamic_size():
    model = long_memory(dynamic_img_size=True)
    with pytest.raises(
        ValueError, match=r"height and width must be multiples of the patch size 8, got \(1, 3, 1, 16, 20\)"
    ):
        model(torch.zeros(1, 3, 1, 16, 20))
