"""Every task from a manifest to its metrics, probes, and what batch norms need of the loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from endomamba import cli
from endomamba.models import create_model
from endomamba.train import finetune, loop, manifest
from endomamba.train.config import with_changes
from endomamba.train.data import IGNORE, Normalise
from endomamba.train.evaluate import open_split, read_videos
from endomamba.train.manifest import DataError, Entry
from endomamba.train.plan import Sample
from endomamba.train.running import running_statistics, share_out
from endomamba.train.targets import IGNORED
from endomamba.train.tasks import TASKS, known, mask_loss, point_loss, set_loss
from endomamba.train.world import start_world
from endomamba.video import write_video

from .common import ONE, SIZE, TINY, finish, fit, start, steps, tiny

MODEL = {**TINY, "drop_path_rate": 0.0, "head_width": 32}
NORMALISE = Normalise("imagenet", torch.device("cpu"))
FRAMES = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos of a bright square that wanders; its mask, its middle and a corner, and in which halves it is."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    phases, sets, clips = [], [], []
    for video in range(5):
        rng = np.random.default_rng(video)
        x, y = rng.integers(0, SIZE - 12, 2)
        pictures, labels, lines = [], [], []
        (folder / f"{video}").mkdir()
        for t in range(FRAMES):
            x, y = (int(np.clip(v + rng.integers(-4, 5), 0, SIZE - 12)) for v in (x, y))
            mask = np.zeros((SIZE, SIZE), np.uint8)
            if video != 4:  # in the last one there is nothing
                mask[y : y + 12, x : x + 12] = 255
            pictures.append(np.stack([40 + mask // 2, 60 + mask // 3, np.full_like(mask, 50)], 2))
            Image.fromarray(mask).save(folder / f"{video}" / f"{t}.png")
            labels.append((x > 10, y > 10))
            seen = video != 4
            lines.append({"frame": t, "landmarks": [[int(seen), x + 5.5, y + 5.5], [int(seen and x < 10), x, y]]})
        write_video(folder / f"{video}.mp4", pictures, gop=6, options={"crf": "8", "threads": "1"})
        header = {"kind": "endomamba places", "size": [SIZE, SIZE], "landmarks": ["middle", "corner"]}
        rows = "\n".join(json.dumps(row) for row in [header, *lines])
        (folder / f"{video}.places.jsonl").write_text(rows)
        beside = {"mask": f"{video}", "box": f"{video}", "landmarks": f"{video}.places.jsonl",
                  "split": "val" if video > 2 else "train"}  # fmt: skip
        phases.append(Entry(f"{video}.mp4", 0, FRAMES, tuple((int(right), 1) for right, _ in labels), **beside))
        each = tuple((tuple(int(k) for k in range(2) if of_frame[k]), 1) for of_frame in labels)
        sets.append(Entry(f"{video}.mp4", 0, FRAMES, each, **beside))
        clips.append(Entry(f"{video}.mp4", 0, FRAMES, int(video != 4 and video % 2), **beside))
    for name, entries in (("phase", phases), ("sets", sets), ("classification", clips)):
        manifest.write(folder / f"{name}.jsonl", ["left", "right"], entries)
    return folder


def path(data, task):
    return data / f"{task if task in ('sets', 'classification') else 'phase'}.jsonl"


def config_of(task, **changes):
    memory = {"memory": "clip", "chunk": 0} if task == "classification" else {}
    return tiny(**{"task": task, "model_options": MODEL, **memory, **changes})


# ---- losses


def test_mask_loss_by_hand():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=rng)
    true = (torch.rand(2, 3, 4, 4, generator=rng) < 0.4).to(torch.uint8)
    true[0, 2] = IGNORED
    want = []
    for i, frames in ((0, 2), (1, 3)):  # clip by clip, over two classes as published
        two = torch.stack((torch.zeros_like(logits[i, :frames]), logits[i, :frames]), 1)
        label = true[i, :frames].long()
        share, real = two.softmax(1), F.one_hot(label, 2).movedim(-1, 1).float()
        dice = 0
        for k in range(2):
            p, y = share[:, k], real[:, k]
            dice += 1 - (2 * (p * y).sum() + 1e-5) / ((p * p).sum() + (y * y).sum() + 1e-5)
        want.append(0.5 * F.cross_entropy(two, label) + 0.5 * dice / 2)
    got = mask_loss({"mask": logits}, {"mask": true}, None)
    torch.testing.assert_close(got.loss, torch.stack(want).mean())
    said = (logits > 0) & (true != IGNORED)
    torch.testing.assert_close(got.dice, 2 * (said & (true == 1)).sum() / (said.sum() + (true == 1).sum()))


def test_point_and_set_losses_by_hand():
    nan = float("nan")
    got = torch.tensor([[[[1.0, 0.5, 0.5], [-2.0, 0.1, 0.1]]], [[[0.5, 0.3, 0.3], [3.0, 0.0, 0.0]]]])
    true = torch.tensor([[[[1.0, 0.52, 0.5], [0.0, nan, nan]]], [[[nan, nan, nan], [nan, nan, nan]]]])
    output = point_loss({"landmarks": got}, {"landmarks": true}, config_of("localisation", position_weight=2.0))
    visible = (F.softplus(torch.tensor(-1.0)) + F.softplus(torch.tensor(-2.0))) / 4
    torch.testing.assert_close(output.loss, visible + 2 * (0.5 * 0.02**2 / 0.05) / 4, atol=1e-6, rtol=1e-5)
    assert float(output.visibility) == 1 and float(output.distance) == pytest.approx(0.02, abs=1e-6)
    logits, label = torch.tensor([[[1.0, -1.0], [2.0, 0.0]]]), torch.tensor([[[1, 0], [IGNORE, IGNORE]]])
    want = 2 * F.softplus(torch.tensor(-1.0)) / 4
    torch.testing.assert_close(set_loss(logits, {"label": label}, None).loss, want)


def test_what_is_known():
    masks = torch.full((3, 2, 2), IGNORED)
    masks[1, 0, 0] = 0
    assert known("mask", masks).tolist() == [False, True, False]
    marks = torch.full((2, 2, 3), float("nan"))
    marks[1, 0, 0] = 0
    assert known("landmarks", marks).tolist() == [False, True]
    assert known("label", torch.tensor([[0, 1], [IGNORE, IGNORE]])).tolist() == [True, False]
    assert known("label", torch.tensor([IGNORE, 0])).tolist() == [False, True]


# ---- from the command to the metrics


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_and_evaluated(data, tmp_path, capsys, task):
    changes = {"task": task, "model": "endomamba", "model_options": MODEL, "precision": "fp32", "workers": 0,
               "clip.frames": 6, "batch_size": 2, "epochs": 2, "lr": 0.003, "warmup": 0, "eval_every": 2,
               "memory": "clip" if task == "classification" else "carried"}  # fmt: skip
    given = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    given += ["--data", str(path(data, task)), "--device", "cpu"]
    assert cli.main(["finetune", "synthetic-phases", *given, "--out", str(tmp_path / "run"), "--debug"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    weights = ["--weights", str(tmp_path / "run" / "final.safetensors"), "--split", "val"]
    assert cli.main(["eval", "synthetic-phases", *given, *weights, "--debug"]) == 0
    values = json.loads(capsys.readouterr().out)
    last = {name: value for name, value in rows[-1].items() if name not in ("step", "kind")}
    assert values == pytest.approx(last, nan_ok=True) and values["unreadable"] == 0
    assert TASKS[task].best in values and (tmp_path / "run" / "best.safetensors").exists()
    # What was trained streams without being told what it is, its masks and landmarks too.
    weights = ["--weights", str(tmp_path / "run" / "best.safetensors"), "--device", "cpu"]
    run = ["stream", str(data / "3.mp4"), *weights, "--out", str(tmp_path / "st"), "--verify", "--quiet", "--debug"]
    assert cli.main(run) == 0
    lines = [json.loads(line) for line in (tmp_path / "st" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == FRAMES and {path.name for path in (tmp_path / "st").iterdir()} >= {"annotated.mp4"}
    assert all((line["mask_share"] is not None) == (task == "segmentation") for line in lines)
    assert all(("landmarks" in line) == (task == "localisation") for line in lines)
    assert all(bool(line["labels"]) == (not TASKS[task].targets) for line in lines)
    if task == "localisation":
        assert np.shape([line["landmarks"] for line in lines]) == (FRAMES, 2, 3)


LEARNED = {"segmentation": ("dice", 0.6), "localisation": ("visibility", 0.8), "sets": (None, 0)}
SHARE = {"segmentation": 0.7, "localisation": 0.8, "sets": 0.9}  # of the loss at the begin, at the end


@pytest.mark.parametrize("task", LEARNED)
def test_tasks_learn(data, tmp_path, task):
    wide = {"model_options": {**MODEL, "embed_dim": 32}}
    config = config_of(task, lr=5e-3, **{"clip.frames": 6, "chunk": 3, **wide})
    config = steps(config, manifest.read(path(data, task)).split("train"), 60)
    fit(config, path(data, task), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    name, least = LEARNED[task]
    assert rows[-1]["loss"] < SHARE[task] * rows[0]["loss"]
    assert name is None or rows[-1][name] > least
    if task == "localisation":
        assert rows[-1]["distance"] < 0.6 * rows[0]["distance"]


@pytest.mark.parametrize("task", ["segmentation", "localisation", "sets"])
def test_streams_are_judged_as_whole_videos(data, task):
    """Read window by window with its state, a video gives what it gives read at once."""
    config = config_of(task, **{"clip.frames": 5})
    listed = manifest.read(path(data, task))
    torch.manual_seed(1)
    model = finetune.build(config, listed, "", head=False).eval()
    parts, whole = open_split(config, listed, "train", SIZE), open_split(
        with_changes(config, {"memory": "clip", "chunk": 0, "clip.frames": 0}), listed, "train", SIZE
    )  # fmt: skip
    parts.train = whole.train = False
    with torch.no_grad():
        read = list(read_videos(config, model, parts, range(3), ONE, TASKS[task].predict))
        for i, (predicted, true, lost) in enumerate(read):
            assert lost == 0
            item = whole[Sample(i, 0, i, 0)]
            answer = TASKS[task].predict(model(NORMALISE(item["video"][None])))[0]
            assert len(predicted) == FRAMES
            torch.testing.assert_close(true, item[TASKS[task].truth], equal_nan=True)
            if predicted.dtype == torch.bool:
                assert (predicted != answer).float().mean() < 1e-3
            else:
                torch.testing.assert_close(predicted, answer, rtol=1e-4, atol=1e-4)


# ---- other backbones, probes

BACKBONES = {
    "videomamba": {"img_size": SIZE, "embed_dim": 16, "depth": 2, "d_state": 4, "num_frames": 4},
    "endofm": {"img_size": SIZE, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_frames": 4},
    "endomamba": TINY,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_one_protocol_for_all_backbones(data, tmp_path, name):
    for task in TASKS:
        changes = {"model": name, "memory": "clip", "chunk": 0, "epochs": 0.7, "clip.frames": 4, "eval_every": 0}
        options = {**BACKBONES[name], "head_width": 32} if task in ("segmentation", "localisation") else BACKBONES[name]
        config = with_changes(config_of(task), {**changes, "model_options": options})
        values = fit(config, path(data, task), tmp_path / task)
        again = finetune.judge(
            config, manifest.read(path(data, task)), tmp_path / task / "final.safetensors", "val", ONE
        )
        assert again == pytest.approx(values, nan_ok=True), task
        # What was learned for one task is where another one starts: the head is left out.
        start = with_changes(config, {"weights": str(tmp_path / task / "final.safetensors"), "task": "phase",
                                      "model_options": BACKBONES[name]})  # fmt: skip
        finetune.build(start, manifest.read(path(data, "phase")), start.weights, head=False)


@pytest.mark.parametrize("name", BACKBONES)
def test_linear_probe_moves_the_head_alone(data, tmp_path, name):
    changes = {"model": name, "model_options": BACKBONES[name], "probe": "linear", "memory": "clip", "chunk": 0,
               "epochs": 2.0, "clip.frames": 4}  # fmt: skip
    config = with_changes(config_of("phase"), changes)
    listed = manifest.read(path(data, "phase"))
    torch.manual_seed(config.seed)
    before = finetune.build(config, listed, "", head=False).state_dict()
    fit(config, path(data, "phase"), tmp_path)
    from safetensors.torch import load_file

    after = load_file(tmp_path / "final.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize("task", ["phase", "classification", "sets"])
@pytest.mark.parametrize("name", BACKBONES)
def test_nearest_neighbours(data, tmp_path, capsys, name, task):
    """On what it was made of, the nearest one is itself; no head is needed in the file."""
    changes = {"model": name, "model_options": BACKBONES[name], "probe": "knn", "neighbours": 1, "memory": "clip",
               "chunk": 0, "clip.frames": 4}  # fmt: skip
    config = with_changes(config_of(task), changes)
    torch.manual_seed(0)
    torch.save(create_model(name, **BACKBONES[name]).state_dict(), tmp_path / "backbone.pth")
    listed = manifest.read(path(data, task))
    values = finetune.judge(config, listed, tmp_path / "backbone.pth", "train", ONE)
    assert values["ap" if task == "sets" else "accuracy"] == pytest.approx(1.0)
    assert finetune.judge(config, listed, tmp_path / "backbone.pth", "val", ONE).keys() == values.keys()
    with pytest.raises(ValueError, match="probe='knn' has nothing to train"):
        fit(config, path(data, task), tmp_path / "out")


# ---- batch norms in the loop


def test_statistics_stay_as_before_a_bad_step(data, tmp_path):
    """A loss that is not finite: the checkpoint holds the running statistics from before the step."""
    from endomamba.train.errors import NonFiniteLoss

    def train(config, out):
        fit(steps(config, manifest.read(path(data, "phase")).split("train"), 6), path(data, "phase"), out)

    config = config_of("segmentation", save_every=100, log_every=6, **{"clip.frames": 4})
    with pytest.raises(NonFiniteLoss, match="step 1:"):
        train(with_changes(config, {"lr": 1e30, "clip_norm": 0.0}), tmp_path / "bad")
    one = with_changes(config, {"lr": 1e30, "clip_norm": 0.0, "epochs": config.epochs})
    good = steps(one, manifest.read(path(data, "phase")).split("train"), 1)
    fit(good, path(data, "phase"), tmp_path / "good")
    bad, kept = (torch.load(tmp_path / d / "step-00000001.pt", weights_only=True)["model"] for d in ("bad", "good"))
    for name in kept:
        if "running" in name or "tracked" in name:
            assert torch.equal(bad[name], kept[name]), name
    assert any("running" in name for name in kept)


def test_a_resumed_run_has_the_same_statistics(data, tmp_path, monkeypatch):
    """To the bit, as everything else."""
    config = config_of("segmentation", save_every=2, **{"clip.frames": 4, "clip.flip": 0.5})
    config = steps(config, manifest.read(path(data, "phase")).split("train"), 5)
    fit(config, path(data, "phase"), tmp_path / "whole")
    update = loop._Run._update

    def interrupted(run, step, batches):
        if step == 3:
            raise KeyboardInterrupt
        update(run, step, batches)

    monkeypatch.setattr(loop._Run, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(config, path(data, "phase"), tmp_path / "parts")
    monkeypatch.undo()
    fit(config, path(data, "phase"), tmp_path / "parts")
    whole, parts = ((tmp_path / name / "final.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def average_statistics(out):
    with start_world("cpu") as world:
        model = create_model("endomamba", **MODEL, num_classes=2, head="segmentation")
        statistics = running_statistics(model)
        for statistic in statistics:
            statistic.fill_(world.rank + 1)
        share_out(statistics, world)
        torch.save([s.unique().tolist() for s in statistics], out / f"{world.rank}.pt")


def test_processes_share_their_statistics(tmp_path):
    assert finish(start(average_statistics, tmp_path, ranks=2)) == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert len(found[0]) == 27 and all(a in ([1.5], [1]) for a in found[0])
    assert [a for a in found[0] if a == [1.5]] == [a for a in found[1] if a == [1.5]] == [[1.5]] * 18


# ---- what a user does wrong


def test_wrong_tasks(data, tmp_path):
    listed = manifest.read(path(data, "phase"))
    bare = manifest.write(tmp_path / "bare.jsonl", ["a", "b"], [Entry(str(data / "0.mp4"), 0, 9, 1)])
    (tmp_path / "one.places.jsonl").write_text('{"kind": "endomamba places", "size": [9, 9], "landmarks": ["tip"]}')
    other = Entry(str(data / "0.mp4"), 0, 9, landmarks="one.places.jsonl")
    two = Entry(str(data / "0.mp4"), 0, 9, landmarks=str(data / "0.places.jsonl"))
    uneven = manifest.write(tmp_path / "uneven.jsonl", ["a", "b"], [other, two])
    for task, of, why in (
        ("segmentation", bare, "names no file for mask, segmentation needs one"),
        ("localisation", bare, "names no file for landmarks, localisation needs one"),
        ("localisation", uneven, "all clips must have the same landmarks, at least one, got .*places.jsonl: tip"),
        ("phase", manifest.read(path(data, "sets")), "has several labels a frame, phase needs one"),
        ("classification", listed, "has labels by frame, classification needs one class a clip"),
    ):
        with pytest.raises(DataError, match=why):
            fit(config_of(task, **{"clip.frames": 4}), of.path, tmp_path / "out")
    windows = {"model": "videomamba", "model_options": BACKBONES["videomamba"], "memory": "clip", "chunk": 0}
    with pytest.raises(ValueError, match=r"videomamba reads windows of clip\.frames=4: set reset=0"):
        fit(config_of("phase", **windows, **{"clip.frames": 4, "reset": 8}), listed.path, tmp_path / "out")


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"task": "segmentation", "probe": "knn"}, "probe='knn' is for tasks with labels"),
        ({"probe": "svm"}, "probe must be one of"),
        ({"task": "segmentation", "relaxed": 3}, "relaxed is for task='phase'"),
        ({"published_empty": True}, "published_empty is for task='segmentation'"),
        ({"neighbours": 0}, "neighbours must be"),
        ({"clip.frames": 0}, "memory='carried' needs clip.frames >= 1"),
        ({"schedule": "steps"}, "schedule must be one of"),
        ({"task": "segmentation", "model_options": {"head": "mean"}}, "task='segmentation' has a head of its own"),
        ({"model_options": {"head": "localisation"}}, "task='phase' has a head of its own"),
        ({"published_empty": 1, "task": "segmentation"}, "published_empty must be True or False"),
    ],
)
def test_wrong_configs(changes, why):
    with pytest.raises(ValueError, match=why):
        tiny(**changes)


def test_frames_without_a_class_are_not_unreadable(data, tmp_path):
    """They count in no number; `unreadable` is what was not decoded."""
    (tmp_path / "torn.mp4").write_bytes(b"x" * 500)
    entries = [Entry(str(data / "0.mp4"), 0, FRAMES, ((0, 5), (None, FRAMES - 5))), Entry("torn.mp4", 0, 7, ((1, 7),))]
    listed = manifest.write(tmp_path / "m.jsonl", ["a", "b"], entries)
    config = config_of("phase")
    model = finetune.build(config, listed, "", head=False)
    assert finetune.evaluate(config, model, listed, "train", ONE)["unreadable"] == 7


def test_poly_schedule():
    from endomamba.train.optim import rate_at

    assert [rate_at(s, 10, 0, 2.0, 0.0, "poly") for s in (0, 5, 9)] == pytest.approx([2, 2 * 0.5**0.9, 2 * 0.1**0.9])
    assert rate_at(1, 10, 4, 2.0, 0.0, "poly") == 0.5
