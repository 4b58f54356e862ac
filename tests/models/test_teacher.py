"""Teachers: frozen, nothing saved, every kind of module and file, and sentences for those that do not fit."""

import pytest
import torch
from torch import nn

from endomamba.models import CheckpointError, EndoMamba, Teacher, create_model, load_teacher
from endomamba.ops.mixer_inner import api as mixer_api
from tests.models.common import assert_close, make_video, wide_awake
from tests.models.test_checkpoint import save
from tests.models.test_pretrain import masks, tiny
from tests.models.test_videomamba import picture_file
from tests.ops.backends import DEVICE

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3}


def videomamba(seed=1, **options):
    torch.manual_seed(seed)
    return wide_awake(create_model("videomamba", **{**SIZE, "num_frames": 4, **options}), seed)


class Patches(nn.Module):
    """A backbone of one Linear, after `extra` tokens of ones; of clips or of pictures."""

    def __init__(self, extra=0, clips=True, flat=True):
        super().__init__()
        self.proj = nn.Linear(3 * 8 * 8, 16)
        self.drop = nn.Dropout(0.5)
        self.extra, self.clips, self.flat = extra, clips, flat

    def forward(self, x):
        frames = x.transpose(1, 2).flatten(0, 1) if self.clips else x
        patches = frames.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        tokens = self.drop(self.proj(patches))
        if self.clips:
            tokens = tokens.unflatten(0, (x.shape[0], -1))
            tokens = tokens.flatten(1, 2) if self.flat else tokens
        ones = torch.ones(*tokens.shape[:-2], self.extra, 16, dtype=tokens.dtype)
        return torch.cat((ones, tokens), -2)


# ---- frozen


def assert_frozen(teacher, video):
    """No gradient out, none into its weights, nothing saved for one, and the same answer in any mode."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        features = teacher.train()(video)
    assert not features.requires_grad, "its features carry a gradient"
    assert not saved, f"{len(saved)} tensors are saved for a backward that never comes"
    assert not any(p.requires_grad for p in teacher.parameters()), "its weights learn"
    assert not any(module.training for module in teacher.modules()), "it is in training mode"
    assert torch.equal(features, teacher(video)), "it answers differently the second time"
    return features


@pytest.mark.parametrize("module", [Patches(), videomamba(drop_path_rate=0.5)], ids=["module", "videomamba"])
def test_frozen(module, monkeypatch):
    saving, original = [], mixer_api.mixer_inner_op

    def spy(*args):
        saving.append(args[-3])
        return original(*args)

    monkeypatch.setattr(mixer_api, "mixer_inner_op", spy)
    video = torch.randn(2, 3, 4, 32, 32)
    features = assert_frozen(Teacher(module.train()), video)
    assert features.shape == (2, 64, 16) and features.dtype == torch.bfloat16
    assert saving == [False] * 6 * isinstance(module, type(videomamba())), "the op keeps the states of its chunks"


def plant_gradients(monkeypatch):
    monkeypatch.setattr(Teacher, "forward", Teacher.forward.__wrapped__)
    monkeypatch.setattr(nn.Module, "requires_grad_", lambda self, on: self)


def plant_weights_that_learn(monkeypatch):
    monkeypatch.setattr(nn.Module, "requires_grad_", lambda self, on: self)


def plant_training_mode(monkeypatch):
    monkeypatch.setattr(Teacher, "train", nn.Module.train)


@pytest.mark.parametrize(
    "plant, message",
    [
        (plant_gradients, "its features carry a gradient"),
        (plant_weights_that_learn, "its weights learn"),
        (plant_training_mode, "it is in training mode"),
    ],
)
def test_an_unfrozen_teacher_is_caught(monkeypatch, plant, message):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        assert_frozen(Teacher(Patches()), torch.randn(2, 3, 4, 32, 32))


def test_a_step_moves_the_student_only():
    """The loss can be taken from its features; an unfrozen teacher's are refused."""
    model, teacher = tiny(drop_path_rate=0.0).train(), Teacher(videomamba())
    before = [p.clone() for p in teacher.parameters()]
    video, mask = make_video(model, b=2), masks(model)
    losses = model(video, mask, teacher(video))
    losses.loss.backward()
    torch.optim.SGD([*model.parameters(), *teacher.parameters()], lr=0.1).step()
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(teacher.parameters(), before))
    assert model.encoder.norm_f.weight.grad.any()
    with pytest.raises(ValueError, match="carry a gradient"):
        model(video, mask, videomamba().patch_tokens(video).flatten(1, 2))


def test_precision():
    module = videomamba()
    video = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        exact = module.patch_tokens(video).flatten(1, 2)
    with torch.autocast(DEVICE, torch.float16):
        assert torch.equal(Teacher(module, autocast=None)(video), exact), "whatever the student runs in"
    low = Teacher(module)(video)
    assert low.dtype == torch.bfloat16 and 0 < (low - exact).norm() < 0.02 * exact.norm()
    assert Teacher(module, autocast=torch.float16)(video).dtype == torch.float16


# ---- any module


@pytest.mark.parametrize(
    "options, adapter",
    [
        ({}, {}),
        ({"flat": False}, {}),
        ({"extra": 1}, {"extra_tokens": 1}),
        ({"extra": 5, "flat": False}, {"extra_tokens": 5}),
        ({"clips": False}, {"reads": "frame"}),
        ({"clips": False, "extra": 1}, {"reads": "frame", "extra_tokens": 1}),
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_modules_of_every_form(options, adapter):
    """The same patches in the same order, whatever the form."""
    plain = Patches()
    module = Patches(**options)
    module.load_state_dict(plain.state_dict())
    video = torch.randn(2, 3, 4, 32, 32)
    got = Teacher(module, autocast=None, **adapter)(video)
    assert_close("tokens", got, plain.eval()(video).detach(), 1e-6)


@pytest.mark.parametrize("name", ["endomamba", "videomamba", "endofm", "attention_twin"])
def test_every_backbone_can_teach(name):
    """A patch's vector stands where the mask has the patch: a change in a patch shows there most."""
    options = {**SIZE, "embed_dim": 64}
    options |= {"videomamba": {"num_frames": 4}, "endofm": {"num_frames": 4, "num_heads": 2}}.get(name, {})
    torch.manual_seed(0)
    teacher = Teacher(create_model(name, **options), autocast=None)
    video = torch.randn(1, 3, 4, 32, 32)
    changed = video.clone()
    changed[:, :, 2, 8:16, 24:] += 3  # row 1, column 3 of frame 2
    moved = (teacher(changed) - teacher(video)).norm(dim=-1)
    assert moved.shape == (1, 64) and moved.argmax() == 2 * 16 + 1 * 4 + 3


class Gives(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out


@pytest.mark.parametrize(
    "out, adapter, message",
    [
        ({"x": 1}, {}, "must give a floating point tensor of tokens, got dict; wrap it"),
        (torch.zeros(2, 64, 16, dtype=torch.int64), {}, "floating point tensor of tokens, got torch.int64"),
        (
            torch.zeros(2, 65, 16),
            {},
            r"for 2 clips of 4 frames the module must give \(2, 0 \+ 4 n, c\) or \(2, 4, 0 \+ n,",
        ),
        (torch.zeros(2, 64, 16), {"extra_tokens": 1}, r"\(reads='clip', extra_tokens=1\), got \(2, 64, 16\)"),
        (torch.zeros(2, 16), {}, r"got \(2, 16\)"),
        (torch.zeros(8, 16, 16), {}, r"got \(8, 16, 16\)"),
        (torch.zeros(2, 64, 16), {"reads": "frame"}, r"must give \(8, 0 \+ n, c\) \(reads='frame', extra_tokens=0\)"),
        (torch.zeros(2, 1, 16), {"extra_tokens": 1}, r"got \(2, 1, 16\)"),
    ],
)
def test_shapes_that_do_not_fit(out, adapter, message):
    with pytest.raises(ValueError, match=message):
        Teacher(Gives(out), autocast=None, **adapter)(torch.randn(2, 3, 4, 32, 32))


def test_another_grid_is_refused_by_the_student():
    model = tiny()
    video = make_video(model, b=2)
    with pytest.raises(ValueError, match=r"\(b, t n, c\) = \(2, 64, 16\), got \(2, 16, 16\)"):
        model(video, masks(model), Teacher(videomamba(patch_size=16))(video))


def test_options_are_checked():
    for options, message in (
        ({"reads": "video"}, r"reads must be one of \('clip', 'frame'\), got 'video'"),
        ({"extra_tokens": -1}, "extra_tokens must be an integer of at least 0, got -1"),
        ({"autocast": torch.int8}, "autocast must be torch.bfloat16, torch.float16 or None, got torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            Teacher(Patches(), **options)


# ---- files


class PatchTokens(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, video):
        return self.model.patch_tokens(video)


@pytest.mark.parametrize("module", [Patches(), PatchTokens(videomamba())], ids=["module", "videomamba"])
def test_exported_file(module, tmp_path):
    video = torch.randn(2, 3, 4, 32, 32)
    path = tmp_path / "teacher.pt2"
    with torch.no_grad():
        expected = module.eval()(video).flatten(1, -2)
        torch.export.save(torch.export.export(module, (video,)), path)
    teacher = load_teacher(path, autocast=None, device=DEVICE)
    assert_close("tokens", teacher.train()(video), expected, 1e-6)
    features = teacher(video)
    assert not features.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    low = load_teacher(path)(video)
    assert 0 < (low - expected).norm() < 0.02 * expected.norm() and teacher.report is None


def test_checkpoint_by_name(tmp_path):
    """For clips, the default; for pictures, with positions in time of zero; the head of either is left out."""
    source = videomamba(num_classes=5)
    path = save({"model": source.state_dict()}, tmp_path)
    options = {**SIZE, "num_frames": 4}
    teacher = load_teacher("videomamba", path, autocast=None, device=DEVICE, **options)
    video = torch.randn(1, 3, 4, 32, 32)
    assert_close("tokens", teacher(video), source.patch_tokens(video).flatten(1, 2).detach(), 0)
    assert set(teacher.report.skipped) == {"head.weight", "head.bias"}
    assert load_teacher("videomamba_small", path, **SIZE).module.config.num_frames == 16, "the layout for clips"

    pictures = save({"model": picture_file(img_size=32, num_classes=10)}, tmp_path, "pictures.pth")
    teacher = load_teacher("videomamba", pictures, **options)
    assert teacher.report.missing == ("temporal_pos_embedding",) and teacher(video).shape == (1, 64, 16)


def test_a_pretrained_encoder_teaches_what_it_learned(tmp_path):
    """Without a cls it has all its positions; with one they would stay random, and that is refused."""
    path = save({"model": tiny(3).state_dict()}, tmp_path)
    teacher = load_teacher("endomamba", path, with_cls_token=False, **{**SIZE, "depth": 4})
    assert isinstance(teacher.module, EndoMamba) and not teacher.report.missing
    with pytest.raises(ValueError, match=r"weights.pth has no pos_embed for endomamba, which would teach noise"):
        load_teacher("endomamba", path, **{**SIZE, "depth": 4})


def test_what_is_refused(tmp_path):
    path = save(videomamba().state_dict(), tmp_path)
    (tmp_path / "damaged.pt2").write_bytes(b"PK\x03\x04 no")
    for args, options, message in (
        (
            ("videomamba_huge", path),
            {},
            "'videomamba_huge' is neither a .pt2 file of torch.export nor a model; there are",
        ),
        (("videomamba_small",), {}, "videomamba_small without weights would teach noise: pass weights="),
        (("pretrain_endomamba_tiny", path), {}, "pretrain_endomamba_tiny gives no tokens of patches"),
        ((tmp_path / "missing.pt2",), {}, "there is no file .*missing.pt2"),
        ((tmp_path / "damaged.pt2",), {}, r"damaged.pt2 is no file of torch.export \("),
        ((tmp_path / "damaged.pt2", path), {}, "it takes no weights and no options of a model"),
        ((tmp_path / "damaged.pt2",), {"depth": 3}, "it takes no weights and no options of a model"),
    ):
        with pytest.raises(ValueError, match=f"load_teacher: .*{message}"):
            load_teacher(*args, **options)
    with pytest.raises(CheckpointError, match="embed_dim 16, depth 3, the model has 16, 4"):
        load_teacher("videomamba", path, **{**SIZE, "depth": 4, "num_frames": 4})
