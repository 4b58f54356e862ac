"""Steps, evaluation and the commands."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from endomamba import cli
from endomamba.models import CheckpointError, create_model
from endomamba.train import finetune, manifest, recipes
from endomamba.train.data import IGNORE, ClipDataset, Normalise, collate
from endomamba.train.evaluate import read_videos
from endomamba.train.manifest import DataError, Entry
from endomamba.train.plan import Sample
from endomamba.train.tasks import TASKS

from .common import ONE, SIZE, TINY, finish, fit, make_data, start, steps, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), frames=(14, 9, 20, 11))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("endomamba", **{**TINY, "depth": 4, "drop_path_rate": 0.0}, num_classes=2)


IMAGENET = Normalise("imagenet", torch.device("cpu"))


def batch(data, start=4, frames=8, entry=2, **fields):
    listed = manifest.read(data / "phases.jsonl")
    config = tiny(**{"clip.frames": frames, **fields})
    clips = ClipDataset(listed, listed.entries, config.clip, SIZE, 0)
    clips.train = False
    return config, collate([clips[Sample(entry, 0, 0, start, start == 0, tail=True)]])


# ---- carried state


def gradients(model, output):
    model.zero_grad()
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_flow_through_the_state(data, model):
    """A window in pieces has the gradients of the window at once; cut at the pieces' borders it has others."""
    found = {}
    for chunk in (0, 3):
        config, one = batch(data, chunk=chunk)
        found[chunk] = gradients(
            model, finetune.carried_step(model, config, IMAGENET, one | {"carry": model.init_state(1)})
        )
    config, one = batch(data, chunk=3)
    state, step = model.init_state(1), model.step
    try:
        model.step = lambda frames, state: step(frames, state.detach())
        cut = gradients(model, finetune.carried_step(model, config, IMAGENET, one | {"carry": state}))
    finally:
        del model.step
    moved = 0.0
    for name, whole in found[0].items():
        scale = whole.norm() + 1e-6
        assert (found[3][name] - whole).norm() / scale < 1e-4, name
        moved = max(moved, float((cut[name] - whole).norm() / scale))
    assert moved > 1e-2


def test_the_state_goes_on_and_starts_anew_where_a_video_does(data, model):
    config, first = batch(data, start=0)
    _, second = batch(data, start=8)
    state = model.init_state(1)
    a = finetune.carried_step(model, config, IMAGENET, first | {"carry": state})
    b = finetune.carried_step(model, config, IMAGENET, second | {"carry": a.carry})
    video = IMAGENET(torch.cat((first["video"], second["video"]), 2))
    logits = model(video)[0]
    labels = torch.cat((first["label"], second["label"]), 1)[0]
    for output, half in ((a, slice(0, 8)), (b, slice(8, 16))):
        want = torch.nn.functional.cross_entropy(logits[half], labels[half])
        torch.testing.assert_close(output.loss, want, rtol=1e-5, atol=1e-5)
    assert not b.carry.ssm.requires_grad and b.carry.frame.tolist() == [16]
    anew = finetune.carried_step(model, config, IMAGENET, first | {"carry": b.carry})
    torch.testing.assert_close(anew.loss, a.loss, rtol=0, atol=0)
    forgotten = finetune.carried_step(model, config, IMAGENET, second | {"carry": state})
    assert (forgotten.loss - b.loss).abs() > 1e-4  # the state matters
    # A state that is not finite, of a stream that ends there, harms nobody.
    sick = finetune.replace(b.carry, ssm=b.carry.ssm * float("nan"))
    torch.testing.assert_close(finetune.carried_step(model, config, IMAGENET, first | {"carry": sick}).loss, a.loss)


def test_ignored_frames_count_in_no_loss(data, model):
    config, one = batch(data, start=16)
    assert one["label"][0].tolist() == [1] * 4 + [IGNORE] * 4
    output = finetune.carried_step(model, config, IMAGENET, one | {"carry": model.init_state(1)})
    logits = model(IMAGENET(one["video"]))[0, :4]
    want = torch.nn.functional.cross_entropy(logits, torch.ones(4, dtype=torch.int64), reduction="sum") / 8
    torch.testing.assert_close(output.loss, want, rtol=1e-5, atol=1e-5)


# ---- evaluation


@pytest.mark.parametrize("reset", [0, 5])
def test_evaluation_reads_each_video_once_as_a_stream(data, model, reset):
    config = tiny(reset=reset, **{"clip.frames": 4, "clip.stride": 2})
    listed = manifest.read(data / "phases.jsonl")
    clips = ClipDataset(listed, listed.entries, config.clip, SIZE, 0)
    clips.train = False
    with torch.no_grad():
        pairs = list(read_videos(config, model.eval(), clips, range(4), ONE, TASKS["phase"].predict))
    for i, (predicted, label, _) in enumerate(pairs):
        whole = ClipDataset(listed, listed.entries, finetune.replace(config.clip, frames=10), SIZE, 0)
        whole.train = False
        item = whole[Sample(i, 0, 0, 0, True, tail=True)]
        video, want = IMAGENET(item["video"][None]), item["label"]
        pieces = video.split(reset or 10, dim=2)
        alone = torch.cat([model(piece)[0].argmax(1) for piece in pieces])
        known = int((want != IGNORE).sum())
        assert label.tolist() == want[:known].tolist()
        assert predicted.tolist() == alone[:known].tolist()


# ---- it learns, from the command to the metrics

SETTINGS = ["model=endomamba", f"model_options={ {**TINY, 'drop_path_rate': 0.0} }", "precision=fp32", "workers=0",
            "log_every=10", "save_every=100", "keep=1"]  # fmt: skip


def command(*args):
    return [part for setting in [*SETTINGS, *args] for part in ("--set", setting)]


def test_phases_are_learned_and_evaluated(data, tmp_path, capsys):
    """Which half of a video a frame is in can be read off it: its number is drawn in it."""
    out = tmp_path / "out"
    settings = command("lr=0.01", "epochs=30", "batch_size=2", "clip.frames=8", "chunk=4", "clip.jitter=0.0")
    settings += ["--set", "clip.flip=0.0", "--data", str(data / "phases.jsonl")]
    assert cli.main(["finetune", "synthetic-phases", *settings, "--out", str(out), "--debug"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    capsys.readouterr()
    weights = ["--weights", str(out / "final.safetensors")]
    assert cli.main(["eval", "synthetic-phases", *settings, *weights, "--split", "val"]) == 0
    values = json.loads(capsys.readouterr().out)
    last = {k: v for k, v in rows[-1].items() if k not in ("step", "kind")}
    assert values == pytest.approx(last) and values["unreadable"] == 0
    assert (out / "best.safetensors").exists()


def test_classes_are_learned(data, tmp_path):
    config = tiny(task="classification", memory="clip", chunk=0, batch_size=3, **{"clip.flip": 0.5})
    config = steps(config, manifest.read(data / "classes.jsonl").split("train"), 40)
    values = fit(config, data / "classes.jsonl", tmp_path)
    assert {"accuracy", "precision", "recall", "jaccard", "f1", "f1_positive", "unreadable"} <= values.keys()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["kind"] == "train" and rows[-2]["accuracy"] > 0.9


def test_a_damaged_video_is_left_out_of_the_metrics(tmp_path):
    make_data(tmp_path)
    listed = manifest.read(tmp_path / "phases.jsonl")
    (tmp_path / "2.mp4").write_bytes(b"x" * 500)
    config = tiny()
    model = finetune.build(config, listed, "", head=False)
    values = finetune.evaluate(config, model, listed, "train", ONE)
    assert values["unreadable"] == 20
    manifest.write(tmp_path / "one.jsonl", listed.classes, listed.entries[2:3])
    with pytest.raises(DataError, match="no clip of split 'train' could be decoded"):
        finetune.evaluate(config, model, manifest.read(tmp_path / "one.jsonl"), "train", ONE)


# ---- what a user does wrong


def says(capsys, *args):
    code = cli.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("endomamba: ") and err.count("\n") == 1, err
    return err


def test_bad_input_is_one_sentence(data, tmp_path, capsys):
    listed = manifest.read(data / "phases.jsonl")
    good = [
        "finetune",
        "synthetic-phases",
        *command("batch_size=2", "clip.frames=4", "chunk=0"),
        "--out",
        tmp_path / "out",
    ]
    manifest.write(tmp_path / "gone.jsonl", ["a", "b"], [Entry("nowhere/a.mp4", 0, 9, 1)])
    manifest.write(tmp_path / "unlabelled.jsonl", ["a", "b"], [Entry(str(data / "0.mp4"), 0, 9)])
    manifest.write(tmp_path / "val.jsonl", ["a", "b"], [Entry(str(data / "0.mp4"), 0, 9, 1, split="val")])
    manifest.write(tmp_path / "one.jsonl", ["a"], [Entry(str(data / "0.mp4"), 0, 9, 0)])
    (tmp_path / "empty.jsonl").write_text("")
    lines = (data / "phases.jsonl").read_text().replace("[[0,", "[[7,")
    (tmp_path / "label.jsonl").write_text(lines)
    for name, why in {
        "gone": "nowhere/a.mp4 does not exist", "unlabelled": "has no label", "val": "has no clip of split 'train'",
        "one": "needs at least two classes", "empty": "first line must be a header", "missing": "No such file",
        "label": "label.jsonl, line 2: label 7 is not one of the 2 classes",
    }.items():  # fmt: skip
        assert why in says(capsys, *good, "--data", tmp_path / f"{name}.jsonl"), name
    ours = [*good, "--data", data / "phases.jsonl"]
    (tmp_path / "text.pth").write_text("no weights")
    for setting, why in {
        f"weights={tmp_path / 'gone.pth'}": "gone.pth: does not exist",
        f"weights={tmp_path / 'text.pth'}": "neither a PyTorch nor a safetensors file",
        "model=resnet": "no model is named 'resnet'",
        "model_options.size=3": "unexpected keyword argument 'size'", "speed=3": "has no field 'speed'",
        "lr=fast": "lr must be a number", "task=classification": "for tasks by frame", "speed": "must be FIELD=VALUE",
    }.items():  # fmt: skip
        assert why in says(capsys, *ours, "--set", setting), setting
    plain = ["--set", "model_options={}", "--set", "model=endofm"]
    assert "needs a state of fixed size (endomamba_*), endofm has none" in says(capsys, *ours, *plain)
    assert "there is no recipe 'x'; there are cholec80, " in says(
        capsys, "finetune", "x", "--data", data / "phases.jsonl", "--out", tmp_path
    )
    (tmp_path / "file").write_text("")
    assert "file" in says(capsys, *[tmp_path / "file" if arg == tmp_path / "out" else arg for arg in ours])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("step-*"))
    assert listed.entries == manifest.read(data / "phases.jsonl").entries


def test_wrong_checkpoint(data, tmp_path):
    from safetensors.torch import save_file

    save_file(create_model("endomamba", **{**TINY, "embed_dim": 32}).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="it is for embed_dim 32, depth 2, the model has 16, 2"):
        fit(tiny(weights=str(tmp_path / "wide.safetensors")), data / "phases.jsonl", tmp_path / "out")


def command_line(out, *args):
    os.dup2(os.open(f"{out}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    raise SystemExit(cli.main([str(arg) for arg in args]))


def test_the_command_with_two_processes(data, tmp_path):
    """What one of them found wrong is said once."""
    settings = command("batch_size=2", "clip.frames=4", "chunk=2", "epochs=1", "save_every=2", "lr=1e30", "warmup=0")
    args = ["finetune", "synthetic-phases", *settings, "--data", data / "phases.jsonl", "--out", tmp_path / "out"]
    assert 2 in finish(start(command_line, tmp_path / "err", *args, ranks=2))
    lines = [line for rank in (0, 1) for line in (tmp_path / f"err-{rank}").read_text().splitlines()]
    ours = [line for line in lines if line.startswith("endomamba: ")]
    assert len(ours) == 1 and re.search(r"step \d: .*first non-finite layer: \S+; clips: \d.mp4", ours[0]), lines


def test_recipes_are_valid(tmp_path):
    (tmp_path / "a.places.jsonl").write_text('{"kind": "endomamba places", "size": [9, 9], "landmarks": ["tip"]}')
    names = recipes.RECIPES[finetune.FinetuneConfig].keys()
    assert {"polypdiag", "phase-clips", "phase-videos", "synthetic-phases"} <= names
    for name in names:
        config = recipes.find(name)
        if config.memory == "carried":
            assert config.model_options["dt_init"] == "mamba"
        options = {k: v for k, v in config.model_options.items() if k not in ("embed_dim", "depth")}
        small = finetune.replace(config, model="endomamba", model_options=options | {"embed_dim": 16, "depth": 2})
        entry = Entry("a.mp4", 0, 9, landmarks="a.places.jsonl")
        finetune.build(small, manifest.Manifest(tmp_path / "x", ("a", "b"), (entry,)), "", head=False)
    with pytest.raises(ValueError, match="there is no recipe"):
        recipes.find("nothing")
