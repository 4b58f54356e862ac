"""A run that is killed and started again ends with the bits of one that was not.

On a GPU: ENDOMAMBA_TEST_DEVICE=cuda pytest tests/train/test_resume.py -k "killed_equals_uninterrupted and not two"
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from endomamba.train import checkpoint, loop, manifest

from .common import finish, fit, make_data, start, steps, tiny, train_and_die


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), frames=(14, 9, 20, 11, 8, 17))


CARRIED = {"model_options.drop_path_rate": 0.2, "model_options.depth": 4, "clip.flip": 0.5, "label_smoothing": 0.1}
CLIPS = {"memory": "clip", "chunk": 0, "clips_per_entry": 2, "batch_size": 4, "clip.crop": "resized", "workers": 1}


def setup(data, changes, count):
    listed = manifest.read(data / "phases.jsonl")
    listed = manifest.write(data / "train.jsonl", listed.classes, [e for e in listed.entries if e.split == "train"])
    return steps(tiny(**changes), listed.entries, count), data / "train.jsonl"


def tree_leaves_with_path(tree):
    return tree_flatten_with_path(tree)[0]


def same(a: Path, b: Path):
    """Everything in the last checkpoints, bit by bit, and the exported weights."""
    (path, left), (_, right) = checkpoint.load_latest(a), checkpoint.load_latest(b)
    left, right = dict(tree_leaves_with_path(left)), dict(tree_leaves_with_path(right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, keystr(name)
    assert path.with_suffix(".safetensors").read_bytes() == (b / path.name).with_suffix(".safetensors").read_bytes()
    assert (a / "final.safetensors").read_bytes() == (b / "final.safetensors").read_bytes()
    assert lines(a) == lines(b)


def lines(out: Path):
    """What was logged, less what depends on the clock."""
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("clips_per_second", "memory_gib")} for row in kept]


def killed(config, path, out, kills, ranks, seed):
    """Runs until it was killed `kills` times at random points, then to the end."""
    rng = random.Random(seed)
    died = 0
    while died < kills:
        last = checkpoint.latest_path(out) if out.exists() else None
        begin = int(last.stem.removeprefix("step-")) if last else 0
        where = begin + rng.randint(0, 3)  # from at once to behind the next checkpoint
        kill = {rng.randrange(ranks): (where, rng.uniform(0.0, 1.2))}
        codes = finish(start(train_and_die, config, path, out, kill, ranks=ranks))
        if not any(codes):
            break
        assert -signal.SIGKILL in codes, codes
        died += 1
    assert finish(start(train_and_die, config, path, out, {}, ranks=ranks)) == [0] * ranks
    return died


@pytest.mark.parametrize("changes", [CARRIED, CLIPS], ids=["carried", "clips"])
def test_killed_equals_uninterrupted(data, tmp_path, changes):
    config, path = setup(data, changes, 12)
    whole(config, path, tmp_path / "whole")
    kills = 1 if config.workers else 3
    assert killed(config, path, tmp_path / "killed", kills, ranks=1, seed=len(changes)) == kills
    same(tmp_path / "whole", tmp_path / "killed")


def test_killed_equals_uninterrupted_with_two_processes(data, tmp_path):
    config, path = setup(data, CARRIED, 10)
    assert finish(start(train_and_die, config, path, tmp_path / "whole", {}, ranks=2)) == [0, 0]
    assert killed(config, path, tmp_path / "killed", kills=2, ranks=2, seed=1) == 2
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "changes", [CARRIED, {**CARRIED, "precision": "bf16"}, CLIPS], ids=["carried", "bf16", "clips"]
)
def test_twenty_kills(data, tmp_path, changes, ranks):
    config, path = setup(data, changes, 60)
    assert finish(start(train_and_die, config, path, tmp_path / "whole", {}, ranks=ranks)) == [0] * ranks
    assert killed(config, path, tmp_path / "killed", kills=20, ranks=ranks, seed=ranks) == 20
    same(tmp_path / "whole", tmp_path / "killed")


def die_in(name, call, config, path, out):
    """SIGKILL in the `call`-th call of os.NAME."""
    real, calls = getattr(os, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, counted)
    fit(config, path, out)


def whole(config, path, out):
    assert finish(start(train_and_die, config, path, out, {})) == [0]


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A short run that nothing happened to: config, manifest, folder."""
    config, path = setup(data, CARRIED, 6)
    out = tmp_path_factory.mktemp("reference") / "out"
    whole(config, path, out)
    return config, path, out


# A save: .safetensors then .pt, each written, synchronised, renamed (Path.replace is os.replace), its folder too.
@pytest.mark.parametrize("name, call", [("fsync", 5), ("replace", 3), ("fsync", 7), ("replace", 4)])
def test_killed_inside_a_save(reference, tmp_path, name, call):
    config, path, undisturbed = reference
    assert finish(start(die_in, name, call, config, path, tmp_path)) == [-signal.SIGKILL]
    assert checkpoint.latest_path(tmp_path).name == "step-00000002.pt"
    whole(config, path, tmp_path)
    same(undisturbed, tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_another_number_of_processes(data, tmp_path):
    """Clips do not know how many there are; streams do, and say so."""
    config, path = setup(data, CLIPS | {"workers": 0, "lr": 1e-3}, 4)
    assert finish(start(train_and_die, config, path, tmp_path / "clips", {}, ranks=2)) == [0, 0]
    [last] = (tmp_path / "clips").glob("step-00000004.pt")
    two = torch.load(last)["model"]
    last.unlink()
    fit(config, path, tmp_path / "clips")
    for name, value in torch.load(last)["model"].items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-4)
    config, path = setup(data, CARRIED, 4)
    assert finish(start(train_and_die, config, path, tmp_path / "carried", {}, ranks=2)) == [0, 0]
    with pytest.raises(ValueError, match="carries the streams of 2 processes, this run has 1"):
        fit(config, path, tmp_path / "carried")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_in_half_precision(data, tmp_path, precision):
    config, path = setup(data, CARRIED | {"precision": precision, "lr": 1e-3}, 6)
    whole(config, path, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for file in (tmp_path / "again").glob("step-00000006*"):
        file.unlink()
    whole(config, path, tmp_path / "again")
    same(tmp_path / "whole", tmp_path / "again")
    content = checkpoint.load_latest(tmp_path / "again")[1]
    assert bool(content["scaler"]) == (precision == "fp16")


def without_seeds(config, path, out):
    loop._Run._seed = lambda self, step: None
    torch.manual_seed(5)
    fit(config, path, out)


@pytest.mark.parametrize("what", ["nothing", "seeds", "carry"])
def test_what_a_resumed_run_needs(reference, tmp_path, what):
    """The tests above can fail: without the seed of each step, or without the carried state, the bits differ."""
    config, path, undisturbed = reference
    shutil.copytree(undisturbed, tmp_path / "out")
    for file in (tmp_path / "out").glob("step-00000006*"):
        file.unlink()
    if what == "carry":
        file = tmp_path / "out" / "step-00000004.pt"
        content = torch.load(file)
        for tensor in content["ranks"][0]["carries"][0].values():
            tensor.zero_()
        torch.save(content, file)
    target, args = (without_seeds, ()) if what == "seeds" else (train_and_die, ({},))
    assert finish(start(target, config, path, tmp_path / "out", *args)) == [0]
    equal = (tmp_path / "out" / "final.safetensors").read_bytes() == (undisturbed / "final.safetensors").read_bytes()
    assert equal == (what == "nothing")
