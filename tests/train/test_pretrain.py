"""Masked pre-training: the step, the masks, the teacher, what is saved and shown, and the command."""

from __future__ import annotations

import json
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from endomamba import cli
from endomamba.models import PretrainEndoMamba, create_model, load_checkpoint
from endomamba.models.pretrain import Pictures
from endomamba.train import checkpoint, manifest, pretrain, recipes
from endomamba.train.config import with_changes
from endomamba.train.data import ClipConfig, Normalise, collate
from endomamba.train.manifest import DataError, Entry
from endomamba.train.optim import build_optimizer, param_groups, set_rate
from endomamba.train.plan import ClipPlan, Sample, Shares
from endomamba.train.world import World

from .common import ONE, SIZE, TINY, finish, fit, make_data, start, train_and_die
from .test_resume import killed, lines, same

STUDENT = {**TINY, "patch_size": 8, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
TEACHER = {"embed_dim": 16, "depth": 2, "patch_size": 8, "d_state": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """unlabelled.jsonl: three clips to learn from, one of "val", no classes."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    listed = manifest.read(folder / "phases.jsonl")
    manifest.write(folder / "unlabelled.jsonl", [], [Entry(e.path, 0, e.stop, split=e.split) for e in listed.entries])
    manifest.write(folder / "train.jsonl", [], [Entry(e.path, 0, e.stop) for e in listed.entries])
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of a teacher, of a wider one and of one with larger patches."""
    files = {}
    for name, change in (("fits", {}), ("wide", {"embed_dim": 24}), ("coarse", {"patch_size": 16})):
        torch.manual_seed(1)
        model = create_model("videomamba", **{**TEACHER, **change}, img_size=SIZE, num_frames=4)
        files[name] = str(tmp_path_factory.mktemp("teacher") / f"{name}.pth")
        torch.save({"model": model.state_dict()}, files[name])
    return files


def tiny(weights=None, **changes):
    """Without a teacher, or with the one that fits; fields as in PretrainConfig."""
    base = pretrain.PretrainConfig(
        model="endomamba", model_options=STUDENT, teacher="", align_weight=0.0, clip=ClipConfig(frames=4),
        batch_size=2, precision="fp32", lr=1e-2, workers=0, log_every=2, save_every=2, keep=2, epochs=4,
    )  # fmt: skip
    if weights:
        teacher = {"teacher": "videomamba", "teacher_weights": weights["fits"], "teacher_options": TEACHER}
        base = with_changes(base, {**teacher, "align_weight": 0.5})
    return with_changes(base, changes)


def parts(config, data):
    """Student, teacher, the data set, and one batch of it."""
    torch.manual_seed(0)
    model = pretrain.build(config)
    listed = manifest.read(data / "train.jsonl")
    clips = pretrain.MaskedClips(config, model, listed, listed.entries)
    teacher = pretrain.build_teacher(config, model, config.batch_size, torch.device("cpu"))
    return model, teacher, clips, collate([clips[Sample(i, 0, i)] for i in range(config.batch_size)])


def step_of(config, model, teacher):
    return partial(pretrain.masked_step, model, teacher, Normalise(config.clip.normalise, torch.device("cpu")))


# ---- the step


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "with-a-teacher"])
def test_it_learns_one_batch(data, weights, taught):
    config = tiny(weights if taught else None)
    model, teacher, _, batch = parts(config, data)
    before = [p.clone() for p in teacher.parameters()] if taught else []
    optimizer = build_optimizer("adamw", param_groups(model, 0.05), (0.9, 0.999))
    set_rate(optimizer, 1e-2)
    step, outputs = step_of(config, model, teacher), []
    for _ in range(25):
        outputs.append(step(batch))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first, last = outputs[0], outputs[-1]
    assert last.loss < 0.8 * first.loss and last.reconstruction < 0.9 * first.reconstruction
    if taught:
        torch.testing.assert_close(first.loss, first.reconstruction + 0.5 * first.alignment)
        assert last.alignment < 0.7 * first.alignment
        assert all(torch.equal(p, q) and p.grad is None for p, q in zip(teacher.parameters(), before))
    else:
        assert first.alignment is None and teacher is None and torch.equal(first.loss, first.reconstruction)


def test_the_step_is_the_definition(data, weights):
    """Teacher and student read the same normalised clip; the mask is the sample's, the ratio the recipe's."""
    config = tiny(weights, mask="frame", mask_ratio=0.5, **{"clip.normalise": "polypdiag"})
    model, teacher, _, batch = parts(config, data)
    model.eval()
    video = (batch["video"].float() / 255 - 0.45) / 0.225
    mask = torch.stack([model.config.draw_mask(4, seed=config.seed, key=int(key)) for key in batch["key"]])
    assert torch.equal(batch["mask"], mask) and mask.view(2, 4, 16).sum(-1).eq(8).all()
    got, want = step_of(config, model, teacher)(batch), model(video, mask, teacher(video))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert model.config.pixel_mean == (0.45,) * 3 and model.config.align_weight == 0.5


def test_the_step_waits_for_no_device(data, weights, monkeypatch):
    """Beside the look at the mask, which models/pretrain.py leaves to the device where there is one."""
    config = tiny(weights, precision="bf16")
    model, teacher, _, batch = parts(config, data)
    monkeypatch.setattr(PretrainEndoMamba, "_check", lambda *args: None)
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
                asked.append(op.name())
            return op(*args, **(kwargs or {}))

    with Watch(), config.autocast(torch.device("cpu")):
        step_of(config, model, teacher)(batch).loss.backward()
        assert not asked
        int(batch["key"][0])
    assert asked, "the watch sees nothing"


# ---- masks


def masks_of(clips, ranks, parts):
    """{sample: mask} of the first epochs, as `ranks` processes would draw them."""
    plan, found = ClipPlan(len(clips), 4, 0), {}
    for rank in range(ranks):
        for samples in Shares(plan, 0, 3, rank, ranks, parts):
            torch.manual_seed(rank)  # what else is random in a process
            batch = collate([clips[sample] for sample in samples])
            found |= dict(zip(batch["samples"], batch["mask"]))
    return found


def assert_masks_are_the_samples_own(clips):
    alone = masks_of(clips, 1, 1)
    for ranks, parts_ in ((2, 1), (1, 4), (2, 2)):
        other = masks_of(clips, ranks, parts_)
        assert other.keys() == alone.keys() and all(torch.equal(other[sample], alone[sample]) for sample in alone)
    assert len({tuple(mask.tolist()) for mask in alone.values()}) == len(alone) == 12, "masks repeat"


def plant_random_masks(clips):
    clips.draw = lambda *, key: torch.rand(64) < 0.75


def plant_masks_without_the_epoch(clips):
    real, get = clips.draw, pretrain.ClipDataset.__getitem__

    class Same(type(clips)):
        def __getitem__(self, sample):
            return get(self, sample) | {"mask": real(key=sample.entry), "readable": torch.tensor(True)}

    clips.__class__ = Same


@pytest.mark.parametrize("plant", [None, plant_random_masks, plant_masks_without_the_epoch])
def test_a_mask_does_not_depend_on_batch_or_rank(data, plant):
    clips = parts(tiny(mask="frame"), data)[2]
    if plant is None:
        assert_masks_are_the_samples_own(clips)
        return
    plant(clips)
    with pytest.raises(AssertionError):
        assert_masks_are_the_samples_own(clips)


# ---- the run


@pytest.fixture(scope="module")
def taught(data, weights, tmp_path_factory):
    """A run of 6 steps with a teacher that nothing happened to: config, folder."""
    config = tiny(weights, eval_every=4, **{"model_options.drop_path_rate": 0.2, "clip.flip": 0.5})
    out = tmp_path_factory.mktemp("run") / "out"
    assert finish(start(train_and_die, config, data / "unlabelled.jsonl", out, {})) == [0]
    return config, out


def test_killed_equals_uninterrupted(data, taught, tmp_path):
    config, whole = taught
    args = (config, data / "unlabelled.jsonl", tmp_path)
    assert finish(start(train_and_die, *args, {0: (3, 0.5)})) == [-signal.SIGKILL]
    assert not (tmp_path / "final.safetensors").exists()
    assert finish(start(train_and_die, *args, {})) == [0]
    same(whole, tmp_path)
    for path in whole.glob("reconstructions-*.png"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(data, weights, tmp_path, ranks):
    """With a teacher, masks and stochastic depth, at random points of 60 steps."""
    drawn = {"model_options.drop_path_rate": 0.2, "clip.flip": 0.5}
    config, path = tiny(weights, epochs=40 * ranks, **drawn), data / "unlabelled.jsonl"
    assert finish(start(train_and_die, config, path, tmp_path / "whole", {}, ranks=ranks)) == [0] * ranks
    assert killed(config, path, tmp_path / "killed", kills=20, ranks=ranks, seed=ranks) == 20
    same(tmp_path / "whole", tmp_path / "killed")


def test_masks_of_another_seed_give_another_run(data, taught, tmp_path, monkeypatch):
    """The test above can fail: masks that are drawn anew each time change the weights."""
    config, whole = taught
    again = partial(torch.randint, 2**60, (), generator=torch.Generator().manual_seed(1))
    real = pretrain.MaskedClips.__getitem__
    monkeypatch.setattr(
        pretrain.MaskedClips, "__getitem__", lambda self, s: real(self, s) | {"mask": self.draw(key=int(again()))}
    )
    fit(config, data / "unlabelled.jsonl", tmp_path)
    assert (tmp_path / "final.safetensors").read_bytes() != (whole / "final.safetensors").read_bytes()


def test_two_processes_do_what_one_does(data, weights, tmp_path):
    config = tiny(weights, lr=1e-3, epochs=3, **{"model_options.drop_path_rate": 0.0})
    path, found = data / "unlabelled.jsonl", {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        assert finish(start(train_and_die, config, path, out, {}, ranks=ranks)) == [0] * ranks
        found[ranks] = checkpoint.load_latest(out)[1]["model"], lines(out)[-1]
    for name, value in found[1][0].items():
        torch.testing.assert_close(found[2][0][name], value, rtol=1e-4, atol=1e-4)
    assert found[2][1] == pytest.approx(found[1][1], rel=1e-4) and "alignment" in found[1][1]


def assert_teacher_is_apart(out, config):
    content = checkpoint.load_latest(out)[1]
    names = pretrain.build(config).state_dict().keys()
    assert content["model"].keys() == names, content["model"].keys() - names
    held = [i for group in content["optimizer"]["param_groups"] for i in group["params"]]
    assert len(held) == len(list(pretrain.build(config).parameters()))


def test_the_teacher_is_neither_trained_nor_saved(data, taught, weights, tmp_path, monkeypatch):
    config, out = taught
    assert_teacher_is_apart(out, config)
    real = pretrain.build_teacher

    def planted(config, model, *args):
        model.teacher = real(config, model, *args).requires_grad_(True)
        return model.teacher

    monkeypatch.setattr(pretrain, "build_teacher", planted)
    fit(with_changes(config, {"epochs": 1}), data / "unlabelled.jsonl", tmp_path)
    with pytest.raises(AssertionError, match="teacher"):
        assert_teacher_is_apart(tmp_path, config)


def test_what_is_logged_and_shown(taught):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out = taught
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(row["reconstruction"] + 0.5 * row["alignment"], rel=1e-5)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4, 6] and rows[-1]["unreadable"] == 0
    with Image.open(out / "reconstructions-00000006.png") as image:
        picture = np.asarray(image)
    assert picture.shape == (3 * SIZE, 4 * SIZE, 3)  # one clip of "val", four frames
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("eval/reconstructions")
    assert [event.step for event in shown] == [4, 6] and (shown[-1].width, shown[-1].height) == (4 * SIZE, 3 * SIZE)


def test_a_strip_has_clips_below_each_other_and_frames_side_by_side():
    b, t, h, w = 2, 3, 4, 5
    pictures = Pictures(*torch.rand(3, b, 3, t, h, w))
    got = pretrain.strip(pictures)
    assert got.shape == (b * 3 * h, t * w, 3) and got.dtype == torch.uint8
    for clip in range(b):
        for row, video in enumerate(pictures):
            for frame in range(t):
                top = (clip * 3 + row) * h
                tile = got[top : top + h, frame * w : (frame + 1) * w]
                assert torch.equal(tile, (video[clip, :, frame] * 255).round().to(torch.uint8).permute(1, 2, 0))
    assert pretrain.strip(Pictures(*torch.rand(3, 1, 3, 20, h, w))).shape == (3 * h, 8 * w, 3)


class Second(World):
    """Of two processes, without the other."""

    def gather(self, value):
        return [value]


def test_evaluation_is_the_mean_over_clips(data, weights, tmp_path):
    """Whatever the batch, whoever reads them; a clip that cannot be decoded is left out, and counted."""
    make_data(tmp_path)
    entries = [Entry(f"{i}.mp4", 0, 9, split="val") for i in range(4)]
    listed = manifest.write(tmp_path / "val.jsonl", [], entries)
    (tmp_path / "1.mp4").write_bytes(b"x" * 500)
    config = tiny(weights)
    model, teacher, _, _ = parts(config, data)
    model.eval()
    whole = pretrain.evaluate(config, model, teacher, listed, ONE)
    assert whole["unreadable"] == 1 and whole["reconstructions"].shape == (3 * SIZE, 4 * SIZE, 3)
    alone = pretrain.evaluate(with_changes(config, {"batch_size": 1}), model, teacher, listed, ONE)
    for name in ("loss", "reconstruction", "alignment"):
        assert alone[name] == pytest.approx(whole[name], rel=1e-5)
    ranks = [pretrain.evaluate(config, model, teacher, listed, Second(ONE.device, i, 2)) for i in (0, 1)]
    assert (2 * ranks[0]["loss"] + ranks[1]["loss"]) / 3 == pytest.approx(whole["loss"], rel=1e-5)
    assert "reconstructions" not in ranks[1]
    lost = manifest.write(tmp_path / "lost.jsonl", [], entries[1:2])
    with pytest.raises(DataError, match="no clip of split 'val' could be decoded"):
        pretrain.evaluate(config, model, teacher, lost, ONE)
    pictures = pretrain.evaluate(config, model, teacher, manifest.read(data / "train.jsonl"), ONE)
    assert pictures.keys() == {"reconstructions"} and pictures["reconstructions"].shape[0] == 2 * 3 * SIZE


# ---- the command, and what follows it


SETTINGS = {"precision": "fp32", "workers": 0, "log_every": 5, "save_every": 100, "keep": 1}


def command(**changes):
    return [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]


def test_the_encoder_is_finetuned(data, tmp_path, capsys):
    student = {**STUDENT, "drop_path_rate": 0.0}
    changed = command(**SETTINGS, model_options=student, epochs=6, warmup=0, batch_size=2)
    changed += ["--set", "clip.frames=4", "--data", str(data / "unlabelled.jsonl")]
    assert cli.main(["pretrain", "synthetic-clips", *changed, "--out", str(tmp_path / "pre"), "--debug"]) == 0
    final = tmp_path / "pre" / "final.safetensors"
    assert capsys.readouterr().out.endswith(f"written  {final}\n")

    options = {**TINY, "patch_size": 8, "drop_path_rate": 0.0}
    model, source = create_model("endomamba", **options, num_classes=2), pretrain.build(tiny())
    load_checkpoint(source, final)
    report = load_checkpoint(model, final, map_pos_embed=True)
    assert set(report.missing) == {"cls_token", "head.weight", "head.bias"} and not report.unexpected
    assert report.remapped["encoder.norm_f.weight"] == "norm_f.weight" and "mask_token" in report.skipped
    for name, tensor in source.encoder.state_dict().items():
        assert name == "pos_embed" or torch.equal(tensor, model.state_dict()[name]), name

    changed = command(**SETTINGS, model="endomamba", model_options=options, epochs=1, batch_size=2, weights=final, lr=0)
    changed += ["--set", "clip.frames=4", "--set", "chunk=0", "--set", "map_pos_embed=True"]
    changed += ["--data", str(data / "phases.jsonl"), "--out", str(tmp_path / "fine")]
    assert cli.main(["finetune", "synthetic-phases", *changed, "--debug"]) == 0
    load_checkpoint(model, tmp_path / "fine" / "final.safetensors")  # with a rate of 0 it is what it began with
    for name, tensor in source.encoder.state_dict().items():
        assert name == "pos_embed" or torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("form", ["file", "projected"])
def test_other_teachers(data, weights, tmp_path, form):
    """A file of torch.export, which reads two clips and no other number; a wider one, through a projection."""
    if form == "file":

        class Tokens(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Conv3d(3, 16, (1, 8, 8), (1, 8, 8))

            def forward(self, video):
                return self.embed(video).flatten(2).transpose(1, 2)

        torch.export.save(torch.export.export(Tokens(), (torch.randn(2, 3, 4, SIZE, SIZE),)), tmp_path / "teacher.pt2")
        config = tiny(teacher=str(tmp_path / "teacher.pt2"), align_weight=1.0, epochs=1)
    else:
        options = {**TEACHER, "embed_dim": 24}
        config = tiny(weights, teacher_weights=weights["wide"], teacher_options=options, teacher_dim=24, epochs=1)
    values = fit(config, data / "unlabelled.jsonl", tmp_path / "out")
    assert 0 < values["alignment"] < 2
    assert ("encoder_to_teacher.weight" in checkpoint.load_latest(tmp_path / "out")[1]["model"]) == (form != "file")
    if form == "file":
        with pytest.raises(ValueError, match=r"teacher.pt2 cannot read the clips of a process, \(3, 3, 4, 32, 32\): "):
            parts(with_changes(config, {"batch_size": 3}), data)


def says(capsys, *args):
    code = cli.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("endomamba: ") and err.count("\n") == 1, err
    return err


def test_bad_input_is_one_sentence(data, weights, tmp_path, capsys):
    good = ["pretrain", "synthetic-clips", *command(**SETTINGS, model_options=STUDENT, batch_size=2)]
    good += ["--set", "clip.frames=4", "--data", data / "unlabelled.jsonl", "--out", tmp_path / "out"]
    (tmp_path / "text.pth").write_text("no weights")
    student = tmp_path / "student.pth"
    torch.save(pretrain.build(tiny()).state_dict(), student)
    taught = {
        "teacher": "videomamba",
        "teacher_weights": weights["fits"],
        "teacher_options": TEACHER,
        "align_weight": 0.25,
    }
    wide = {**taught, "teacher_weights": weights["wide"], "teacher_options": {**TEACHER, "embed_dim": 24}}
    coarse = {**TEACHER, "patch_size": 16}
    for changes, why in (
        ({"align_weight": 0.25}, "align_weight=0.25 needs a teacher: name one, or set 0"),
        ({**taught, "teacher_weights": ""}, "teacher videomamba needs teacher_weights, a file; align_weight=0 trains"),
        ({**taught, "teacher_weights": tmp_path / "gone.pth"}, "gone.pth: cannot be opened (No such file"),
        ({**taught, "teacher_weights": tmp_path / "text.pth"}, "neither a PyTorch nor a safetensors file"),
        ({**taught, "teacher_weights": student}, "student.pth: nothing in it fits this model"),
        ({**taught, "teacher": "resnet"}, "'resnet' is neither a .pt2 file of torch.export nor a model"),
        ({**taught, "teacher": "gone.pt2", "teacher_weights": ""}, "it takes no weights and no options of a model"),
        ({**taught, "teacher": "gone.pt2"}, "teacher_weights are for a teacher that is a model; a .pt2 file has its"),
        ({**taught, "teacher": "gone.pt2", "teacher_weights": "", "teacher_options": {}}, "there is no file gone.pt2"),
        ({**taught, "teacher_options": {**TEACHER, "size": 3}}, "teacher_options: got an unexpected keyword argument"),
        ({**taught, "teacher_options": coarse}, "patch_embed.proj.weight"),
        (
            {**taught, "teacher_weights": weights["coarse"], "teacher_options": coarse},
            "teacher videomamba gives 4 patches a frame, the student has 16: both must cut 32 x 32 pixels",
        ),
        (wide, "teacher videomamba gives 24 channels, the student has 16: set teacher_dim=24"),
        ({**wide, "teacher_dim": 8}, "teacher videomamba gives 24 channels, teacher_dim is 8: set teacher_dim=24"),
        ({**taught, "teacher_options": {**TEACHER, "num_frames": 8}}, "cannot read the clips of a process, (2, 3, 4, "),
        ({"mask": "row"}, "mask must be one of ('tube', 'frame', 'random'), got 'row'"),
        ({"mask_ratio": 2}, "mask_ratio must be a number of at least 0 and at most 1, got 2"),
        ({"mask_ratio": 0.01}, "masks 0 of 16 patches"),
        ({"mask": "random", "mask_ratio": 0.72}, "not a multiple of 4 frames: change mask_ratio"),
        ({"model_options.mask_ratio": 0.5}, "mask_ratio is decided by the field mask_ratio, not by model_options"),
        ({"model_options.pixel_std": 1}, "pixel_std is decided by the field clip.normalise"),
        ({"model_options.size": 3}, "unexpected keyword argument 'size'"),
        ({"model_options.img_size": (32, 64)}, "training needs square frames, the model's are 32 x 64"),
        ({"model": "endofm"}, "model must be one of endomamba, endomamba_middle, "),
        ({"task": "phase"}, "PretrainConfig has no field 'task'"),
        ({"batch_size": 3, "accumulate": 2}, "batch_size 3 must be a multiple of processes x accumulate"),
    ):  # fmt: skip
        assert why in says(capsys, *good, *command(**changes)), changes
    empty = tmp_path / "val.jsonl"
    manifest.write(empty, [], [Entry(str(data / "0.mp4"), 0, 9, split="val")])
    assert "has no clip of split 'train'" in says(capsys, *good, "--data", empty)
    for name, kind in (("pretrain", "synthetic-phases"), ("finetune", "synthetic-clips")):
        there = "endomamba-small, nano-clips, synthetic-clips" if name == "pretrain" else "cholec80, "
        err = says(capsys, name, kind, "--data", data / "unlabelled.jsonl", "--out", tmp_path)
        assert f"there is no recipe '{kind}'; there are {there}" in err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("step-*"))


def test_recipes():
    """The published numbers; both students can be built, and synthetic-clips is the model of synthetic-phases."""
    config = recipes.find("endomamba-small", {"teacher_weights": "k400.pth"}, pretrain.PretrainConfig)
    assert (config.mask, config.mask_ratio, config.align_weight) == ("tube", 0.75, 0.25)
    assert (config.teacher, config.clip.frames, config.clip.stride) == ("videomamba_small", 16, 4)
    assert config.lr == pytest.approx(1.5e-4 * 288 / 256) and config.min_lr == pytest.approx(1e-5 * 288 / 256)
    assert (config.epochs, config.warmup, config.batch_size, config.seed) == (500, 40, 288, 5)
    student = pretrain.build(config)
    assert sum(p.numel() for p in student.parameters()) == 26_462_784
    decays = {id(p): group["weight_decay"] for group in param_groups(student, 0.05, config.no_decay)
              for p in group["params"]}  # fmt: skip
    kept = [name for name, p in student.named_parameters() if p.ndim > 1 and not decays[id(p)]]
    assert kept == ["mask_token"] and decays[id(student.encoder.pos_embed)] == 0.05
    small = recipes.find("synthetic-clips", None, pretrain.PretrainConfig)
    phases, names = recipes.find("synthetic-phases"), re.compile("decoder_")
    assert {k: v for k, v in small.model_options.items() if not names.match(k)} == phases.model_options
    pretrain.build(small)
