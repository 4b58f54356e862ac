"""VideoMamba: equal to the published code, its published files, and what the specification says of the parts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from endomamba.models import CheckpointError, VideoMamba, VideoMambaConfig, create_model, load_checkpoint, mixer
from endomamba.models.layers import SpatialBlock
from tests.models.common import BACKENDS, assert_close, make_video, wide_awake
from tests.models.test_checkpoint import save
from tests.ops.backends import DEVICE

GOLDEN = Path(__file__).parents[1] / "golden" / "videomamba_d48_depth4.safetensors"
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_frames": 4}


def tiny(seed=0, **options) -> VideoMamba:
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = create_model("videomamba", **{**TINY, **options})
    return wide_awake(model.to(DEVICE), seed)


# ---- the published code


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN, device=DEVICE)


def assert_parity(golden, backend):
    options = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_frames": 4, "num_classes": 5}
    model = create_model("videomamba", backend=backend, **options).eval()
    model.load_state_dict({name[6:]: t for name, t in golden.items() if name.startswith("param.")})
    video = torch.sin(0.0137 * torch.arange(2 * 3 * 4 * 64 * 64, dtype=torch.float64)).float().view(2, 3, 4, 64, 64)
    logits = model(video)
    assert_close("logits", logits, golden["logits"], 5e-7)  # 5e-6 is asked for

    weights = torch.cos(0.7 * torch.arange(logits.numel(), dtype=torch.float64)).float().view_as(logits)
    (logits * weights).sum().backward()
    named = dict(model.named_parameters())
    assert sorted(named) == sorted(name[5:] for name in golden if name.startswith("grad."))
    for name, p in named.items():
        truth = golden[f"grad.{name}"]
        error, norm = (p.grad - truth).norm(), truth.norm()  # 0 for A_log of the last layer: cls reads no state there
        assert error <= 5e-5 * norm, f"gradient of {name}: off by {error:.2e}, its norm is {norm:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, backend):
    assert_parity(golden, backend)


def plant_one_way(monkeypatch):
    """A backward scan that reads forwards, as a slow path without its flip would."""
    monkeypatch.setattr(mixer.BidirectionalMixer, "parameters_backward", lambda self: self.parameters_forward())


def plant_half_of_both_ways(monkeypatch):
    original = mixer.mixer_inner
    monkeypatch.setattr(mixer, "mixer_inner", lambda *a, **k: original(*a, **k, scale=0.5))


def plant_time_in_cls(monkeypatch):
    original = VideoMamba._embed

    def embed(self, video):
        tokens = original(self, video)
        return torch.cat((tokens[:, :1] + self.temporal_pos_embedding[:, :1], tokens[:, 1:]), 1)

    monkeypatch.setattr(VideoMamba, "_embed", embed)


def plant_frames_read_alone(monkeypatch):
    """EndoMamba's habit: one sequence a frame."""
    original = SpatialBlock.forward

    def forward(self, hidden, residual):
        b, c = hidden.shape[0], hidden.shape[-1]
        cut = [None if x is None else x[:, :, 1:].reshape(b, 4, -1, c) for x in (hidden, residual)]
        frames = [x.reshape(b, 1, -1, c) for x in original(self, *cut)]
        return [torch.cat((whole[:, :, :1], part), 2) for whole, part in zip(original(self, hidden, residual), frames)]

    monkeypatch.setattr(SpatialBlock, "forward", forward)


@pytest.mark.parametrize(
    "plant, caught_by",
    [
        (plant_one_way, "logits"),
        (plant_half_of_both_ways, "logits"),
        (plant_time_in_cls, "gradient of temporal_pos_embedding"),  # zero in the golden, so the logits do not see it
        (plant_frames_read_alone, "logits"),
    ],
)
def test_planted_bug_is_caught(golden, monkeypatch, plant, caught_by):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=rf"^{caught_by}: off by"):
        assert_parity(golden, BACKENDS[0])


@pytest.mark.parametrize(
    "name, bare, with_head, keys",
    [("videomamba_small", 25_417_728, 25_802_728, 414), ("videomamba_tiny", 6_958_080, 7_151_080, 414),
     ("videomamba_middle", 73_649_664, 74_226_664, 550)],
)  # fmt: skip
def test_published_sizes(name, bare, with_head, keys):
    with torch.device("meta"):
        model = create_model(name)
        headed = create_model(name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == bare and len(model.state_dict()) == keys
    assert sum(p.numel() for p in headed.parameters()) == with_head
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if "layers" not in name}
    c = model.config.embed_dim
    assert shapes == {
        "cls_token": (1, 1, c), "pos_embed": (1, 197, c), "temporal_pos_embedding": (1, 16, c),
        "patch_embed.proj.weight": (c, 3, 1, 16, 16), "patch_embed.proj.bias": (c,), "norm_f.weight": (c,),
    }  # fmt: skip


# ---- the parts


def test_published_init():
    torch.manual_seed(0)
    model = create_model("videomamba", **TINY | {"embed_dim": 64, "depth": 4, "num_classes": 5})
    assert not model.cls_token.any() and not model.temporal_pos_embedding.any() and not model.head.bias.any()
    assert 0.015 < model.pos_embed.std() < 0.025 and 0.015 < model.head.weight.std() < 0.025
    block = model.layers[3].mixer
    assert not block.dt_proj.bias.any() and not block.dt_proj_b.bias.any()
    assert 0.9 < block.out_proj.weight.abs().max() * 128**0.5 * 4**0.5 <= 1


def test_drop_path(monkeypatch):
    """EndoMamba's rates in the blocks, and one more at the end, at the whole rate; clips are dropped."""
    model = tiny(depth=5, drop_path_rate=0.2).train()
    assert [block.drop_path.rate for block in model.layers] == pytest.approx([0, 0, 0.05, 0.1, 0.15])
    assert model.drop_path.rate == 0.2
    seen = []
    monkeypatch.setattr(type(model.drop_path), "forward", lambda self, rows: seen.append((self.rate, rows.shape[0])))
    model.norm_f.register_forward_hook(lambda module, args, out: seen.append(args))
    monkeypatch.setattr(model.drop_path, "forward", lambda rows: torch.tensor([0.0, 2.0]))
    features = model.forward_features(make_video(model, b=2))
    *blocks, (hidden, residual, _) = seen
    assert blocks == [(block.drop_path.rate, 2) for block in model.layers]
    last = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1) * hidden
    assert_close(
        "the last block dropped and doubled", features, model.norm_f(residual + last, None)[0].squeeze(1), 1e-5
    )


@torch.no_grad()
def test_patch_tokens_and_the_head():
    model = tiny(num_classes=3)
    video = make_video(model, b=2)
    features = model.forward_features(video)
    assert features.shape == (2, 1 + 4 * 4, 16)
    tokens = model.patch_tokens(video)
    assert tokens.shape == (2, 4, 4, 16) and torch.equal(tokens.flatten(1, 2), features[:, 1:])
    assert torch.equal(model(video), model.head(features[:, 0]))
    assert torch.equal(tiny()(video), tiny().forward_features(video)[:, 0])
    each = torch.cat([model.patch_tokens(clip) for clip in video.split(1)])
    assert_close("clips of a batch do not meet", tokens, each, 2e-6)
    changed = video.clone()
    changed[:, :, 3] += 1
    moved = (model.patch_tokens(changed) - tokens).abs().amax((0, 2, 3))
    assert (moved > 1e-3).all(), "every frame reads the last one"


def test_any_size():
    model = tiny(dynamic_img_size=True)
    assert model.patch_tokens(torch.randn(1, 3, 4, 24, 32)).shape == (1, 4, 12, 16)


def test_checkpointing_and_compile_give_the_same_gradients():
    model = tiny(drop_path_rate=0.0).train()
    video = make_video(model)

    def gradients(features):
        return torch.autograd.grad((features * torch.linspace(-1, 1, 16)).square().sum(), (*model.parameters(),))

    expected = gradients(model.forward_features(video))
    assert all(g.abs().max() > 0 for g in expected)
    model.gradient_checkpointing = True
    assert all(torch.equal(got, want) for got, want in zip(gradients(model.forward_features(video)), expected))
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled(video)), expected):
        assert_close("gradient", got, want, 1e-5 * want.abs().max().item())
    torch.compiler.reset()


@torch.no_grad()
def test_low_precision():
    model = tiny()
    video = make_video(model)
    exact = model.patch_tokens(video)
    with torch.autocast(DEVICE, torch.bfloat16):
        low = model.patch_tokens(video)
    assert low.dtype == torch.bfloat16 and (low - exact).norm() < 0.02 * exact.norm()
    rounded = model.to(torch.bfloat16).patch_tokens(video)
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).norm() < 0.03 * exact.norm()


# ---- published files


@pytest.mark.parametrize("form", ["bare", "model", "module", "module.", "safetensors"])
def test_file_for_clips(tmp_path, form):
    weights = tiny(1, num_classes=3).state_dict()
    content = {"bare": weights, "model": {"model": weights, "epoch": 3}, "module": {"module": weights}}
    content["module."] = {f"module.{name}": t for name, t in weights.items()}
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    else:
        path = save(content[form], tmp_path)
    model = tiny(num_classes=3)
    report = load_checkpoint(model, path)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert not (report.missing or report.unexpected or report.skipped)
    assert bool(report.remapped) == (form == "module.")


def picture_file(**options):
    weights = tiny(1, num_frames=1, **options).state_dict()
    del weights["temporal_pos_embedding"]
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].squeeze(2)
    return weights


def test_file_for_pictures(tmp_path):
    """A Conv2d becomes a Conv3d over one frame; positions in time stay at zero; a head for pictures can be left out."""
    path = save({"model": picture_file(num_classes=10)}, tmp_path)
    torch.manual_seed(0)
    model = create_model("videomamba", **TINY)
    report = load_checkpoint(model, path, drop_head=True)
    assert report.missing == ("temporal_pos_embedding",) and not model.temporal_pos_embedding.any()
    assert report.remapped == {"patch_embed.proj.weight": "patch_embed.proj.weight as a kernel over one frame"}
    assert set(report.skipped) == {"head.weight", "head.bias"}
    frame = make_video(model, t=1)
    kernel = picture_file()["patch_embed.proj.weight"].to(DEVICE)
    plain = nn.functional.conv2d(frame[:, :, 0], kernel, model.patch_embed.proj.bias, stride=8).flatten(2).mT
    assert_close("patches", model.patch_embed(frame)[:, 0], plain, 2e-6)


def test_positions_in_time_are_interpolated(tmp_path):
    """As the published fine-tuning does between 8 and 16 frames: linear, ends held."""
    weights = tiny(1, num_frames=2).state_dict()
    model = tiny(num_frames=4)
    report = load_checkpoint(model, save(weights, tmp_path))
    old, new = weights["temporal_pos_embedding"][0], model.temporal_pos_embedding[0]
    expected = torch.stack((old[0], 0.75 * old[0] + 0.25 * old[1], 0.25 * old[0] + 0.75 * old[1], old[1]))
    assert_close("rows", new, expected, 1e-6)
    how = "temporal_pos_embedding interpolated from 2 to 4 frames"
    assert report.remapped == {"temporal_pos_embedding": how} and not report.missing
    report = load_checkpoint(tiny(img_size=32), save(weights, tmp_path))
    assert "interpolated from 2x2 to 4x4 patches" in report.remapped["pos_embed"]


def test_what_is_refused(tmp_path):
    def assert_refused(weights, message, **options):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tiny(**options), save(weights, tmp_path))

    clips = tiny(1).state_dict()
    few = {name: t for name, t in clips.items() if name != "temporal_pos_embedding"}
    assert_refused(few, "missing: temporal_pos_embedding$")
    assert_refused(clips, "embed_dim 16, depth 3, the model has 16, 4", depth=4)
    assert_refused(picture_file(num_classes=10), "head for 10 classes and this model none")
    endomamba = create_model("endomamba", img_size=16, patch_size=8, embed_dim=16, depth=3)
    assert_refused(endomamba.state_dict(), "missing: temporal_pos_embedding")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_checkpoint(endomamba, save(clips, tmp_path))
    with pytest.raises(ValueError, match="map_pos_embed is for EndoMamba; positions of VideoMamba"):
        load_checkpoint(tiny(), save(clips, tmp_path), map_pos_embed=True)
    with pytest.raises(ValueError, match=r"video must have num_frames=4 frames, got \(1, 3, 2, 16, 16\); create"):
        tiny()(torch.zeros(1, 3, 2, 16, 16))
    with pytest.raises(ValueError, match="VideoMambaConfig: num_frames must be an integer of at least 1, got 0"):
        VideoMambaConfig(num_frames=0)
    with pytest.raises(ValueError, match="VideoMambaConfig: img_size must be a multiple of patch_size=16, got 20 x 20"):
        VideoMambaConfig(img_size=20)
