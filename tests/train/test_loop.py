"""The loop with real and with broken steps: what stops it, what it says, and that nothing is lost."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import endomamba
from endomamba.models import create_model, load_checkpoint
from endomamba.train import checkpoint, finetune, loop, manifest
from endomamba.train.checkpoint import SaveError
from endomamba.train.config import with_changes
from endomamba.train.data import ClipDataset
from endomamba.train.errors import NonFiniteLoss, TrainError
from endomamba.train.manifest import DataError
from endomamba.train.optim import param_groups, rate_at
from endomamba.train.plan import ClipPlan
from endomamba.train.watch import Watch

from .common import ONE, SIZE, TINY, fit, make_data, steps, tiny
from .ddp_gradients import CASES, gradients

ROOT = Path(endomamba.__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Without a split to evaluate on: that would cost every test its import."""
    folder = make_data(tmp_path_factory.mktemp("data"), frames=(14, 9, 20, 11, 16))
    for name in ("phases.jsonl", "classes.jsonl"):
        listed = manifest.read(folder / name)
        manifest.write(folder / name, listed.classes, [e for e in listed.entries if e.split == "train"])
    return folder


def count(data, changes, number):
    return steps(tiny(**changes), manifest.read(data / "phases.jsonl").entries, number)


# ---- a step that is not ours


class Loss(NamedTuple):
    loss: Tensor
    brightness: Tensor


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, video):
        return self.second(self.first(video.float().mean((2, 3, 4)) / 255))


def toy(data, out, number=6, spoil=None, evaluate=None, **changes):
    """Any module and any function of a batch will do; spoil(step number) may return a factor for its loss."""
    torch.manual_seed(0)
    model, config = Toy(), tiny(memory="clip", chunk=0, **changes)
    listed = manifest.read(data / "phases.jsonl")
    dataset = ClipDataset(listed, listed.entries, config.clip, SIZE, 0)
    plan = ClipPlan(len(dataset), config.batch_size, 0)
    config = with_changes(config, {"epochs": number / plan.per_epoch})

    def step(batch):
        key = tuple(batch["samples"])
        at = next(i for i in range(number) if tuple(plan(i)) == key)
        value = model(batch["video"])
        factor = 1.0 if spoil is None else spoil(at, model)
        return Loss((value**2).mean() * factor, value.mean())

    loop.train(config, model, step, dataset, plan, out, ONE, evaluate=evaluate, best="score")
    return model


def test_the_best_weights_are_of_a_number(data, tmp_path):
    """A score that does not exist is none, in the log null; the ones after it are compared as if it had not been."""
    from safetensors import safe_open

    scores = [float("nan"), 0.2, 0.5, float("nan"), 0.4, float("nan")]
    judged = iter(scores)
    toy(data, tmp_path, evaluate=lambda: {"score": next(judged)}, eval_every=1)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["score"] for row in rows if row["kind"] == "eval"] == [None, 0.2, 0.5, None, 0.4, None]
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["endomamba"]) == {"step": "3", "score": "0.5"}


def test_a_step_is_one_function(data, tmp_path):
    toy(data, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert {"loss", "brightness", "grad_norm", "lr", "clips_per_second", "memory_gib"} <= rows[0].keys()
    assert list((tmp_path / "tensorboard").iterdir())
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000004.pt", "step-00000004.safetensors", "step-00000006.pt", "step-00000006.safetensors",
    ]  # fmt: skip


def test_what_is_logged_is_the_mean_over_the_steps_since(data, tmp_path):
    logged = {}
    for every in (1, 3):
        toy(data, tmp_path / str(every), log_every=every)
        lines = (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()
        logged[every] = [json.loads(line) for line in lines]
    for name in ("loss", "brightness", "grad_norm"):
        each = [row[name] for row in logged[1]]
        assert [row[name] for row in logged[3]] == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])


# ---- not finite


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("log_every", [1, 6], ids=["found-at-once", "found-late"])
def test_a_loss_that_is_not_finite_stops_before_the_update(data, tmp_path, log_every, precision):
    def spoil(at, model):
        return float("nan") if at == 3 else 1.0

    options = {"precision": precision, "log_every": log_every, "save_every": 100}
    with pytest.raises(NonFiniteLoss, match=r"^step 3: .*the loss itself; clips: \d\.mp4\[0:\d+\], \d\.mp4") as error:
        toy(data, tmp_path / "bad", spoil=spoil, **options)
    assert "\n" not in str(error.value)
    toy(data, tmp_path / "good", **{**options, "save_every": 3})
    (path, bad), good = checkpoint.load_latest(tmp_path / "bad"), torch.load(tmp_path / "good" / "step-00000003.pt")
    assert path.name == "step-00000003.pt" and bad["step"] == 3
    for name, value in good["model"].items():
        assert torch.equal(bad["model"][name], value), name
    for index, state in good["optimizer"]["state"].items():
        assert all(torch.equal(value, bad["optimizer"]["state"][index][name]) for name, value in state.items())


def test_the_first_layer_that_is_not_finite_is_named(data, tmp_path):
    class Spoiled(nn.Linear):
        spoilt = False

        def forward(self, x):
            return super().forward(x) / (0.0 if self.spoilt else 1.0)

    def spoil(at, model):
        if at == 1:
            model.second.__class__, model.second.spoilt = Spoiled, True
            model(torch.ones(1, 3, 1, 1, 1))
        return 1.0

    with pytest.raises(NonFiniteLoss, match=r"^step 2: .*first non-finite layer: second; clips"):
        toy(data, tmp_path, spoil=spoil)


def test_the_bad_step_is_run_again_with_its_own_random_numbers(data, tmp_path):
    drawn = {}

    def spoil(at, model):
        value = torch.rand(()).item()
        return float("nan") if at == 3 and value == drawn.setdefault(at, value) else 1.0

    with pytest.raises(NonFiniteLoss, match=r"^step 3: .*first non-finite layer: the loss itself"):
        toy(data, tmp_path, spoil=spoil, log_every=6)


@pytest.mark.parametrize(
    "factor, what",
    [("inf", "first non-finite gradient: of"), ("1e30", "gradients too large for their norm: most of all")],
)
def test_a_gradient_that_is_not_finite_stops_too(data, tmp_path, factor, what):
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(factor)

    def spoil(at, model):
        if at == 2:
            model.first.register_forward_hook(lambda module, inputs, output: Root.apply(output))
        return 1.0

    with pytest.raises(NonFiniteLoss, match=rf"^step 3: .*{what} first\.(bias|weight)(, \d+e\+\d+)?; clips"):
        toy(data, tmp_path, spoil=spoil)


def test_a_layer_whose_second_output_nobody_used_is_watched_too():
    """Autograd calls its hook with None."""

    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x.clone(), x + 1

        @staticmethod
        def backward(ctx, first, second):
            return first * float("inf")

    class Layer(nn.Module):
        def forward(self, x):
            return Two.apply(x)

    model = nn.Sequential(nn.Linear(2, 2), Layer())
    with Watch(model) as watch:
        used, _ = model(torch.ones(1, 2))
        used.sum().backward()
    assert not watch.first and watch.first_gradient == "0"


def test_carried_states_stay_as_they_were_before_a_bad_step(data, tmp_path, monkeypatch):
    config, step = count(data, {"log_every": 100, "save_every": 100}, 6), finetune.carried_step
    monkeypatch.setattr(finetune, "carried_step", lambda *a: _spoilt(step(*a), a[3]))
    with pytest.raises(NonFiniteLoss, match=r"^step 3: "):
        fit(config, data / "phases.jsonl", tmp_path / "bad")
    monkeypatch.undo()
    fit(with_changes(config, {"save_every": 3, "keep": 9}), data / "phases.jsonl", tmp_path / "good")
    states = [torch.load(tmp_path / name / "step-00000003.pt")["ranks"][0]["carries"][0] for name in ("bad", "good")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("conv", "ssm", "frame"))
    assert states[0]["ssm"].abs().max() > 0


def _spoilt(output, batch):
    """The fourth step begins after three windows of four frames: NaN where a stream is at frame 12."""
    late = (batch["carry"].frame == 12).any()
    return output._replace(loss=output.loss * torch.where(late, float("nan"), 1.0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [{}, {"memory": "clip", "chunk": 0, "accumulate": 2}], ids=["carried", "clips"])
def test_an_update_asks_the_device_for_nothing(data, tmp_path, monkeypatch, changes, precision):
    """On a GPU each of these would wait for it; here they can be counted."""
    asked, watching = [], [False]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if watching[0] and op.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
                asked.append(op.name())
            return op(*args, **(kwargs or {}))

    update, following, reads = loop._Run._update, loop._Run._next, []

    def watched(self, *args):
        with Watch():
            watching[0] = True
            update(self, *args)
            watching[0] = False

    def unwatched(self, batches):
        watching[0] = False
        reads.append(following(self, batches))
        watching[0] = True
        return reads[-1]

    monkeypatch.setattr(loop._Run, "_update", watched)
    monkeypatch.setattr(loop._Run, "_next", unwatched)
    fit(count(data, {"precision": precision, **changes}, 4), data / "phases.jsonl", tmp_path)
    assert reads and asked == []
    monkeypatch.setattr(loop._Run, "_note", lambda self, step, value: value.item())
    fit(count(data, changes, 1), data / "phases.jsonl", tmp_path / "planted")
    assert asked


# ---- several processes


def test_two_processes_have_the_gradients_of_one(data, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.train.ddp_gradients", str(data), str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two.pt")
    for case in CASES:
        one = gradients(case, data, tmp_path, ONE)
        assert len(one) == len(two[case]) > 10
        whole = torch.sqrt(sum(p.square().sum() for p in one))
        for a, b in zip(one, two[case]):
            assert (a - b).norm() <= 2e-6 * max(a.norm(), 0.01 * whole), case


def test_the_batch_must_split_evenly(data, tmp_path):
    with pytest.raises(ValueError, match="batch_size 2 must be a multiple of processes x accumulate, 1 x 4"):
        fit(tiny(accumulate=4), data / "phases.jsonl", tmp_path)


def test_accumulation_changes_rounding_only(data, tmp_path):
    for parts in (1, 4):
        fit(
            count(data, {"batch_size": 4, "accumulate": parts, "lr": 1e-3}, 3),
            data / "phases.jsonl",
            tmp_path / str(parts),
        )
    one, four = (torch.load(tmp_path / str(parts) / "step-00000003.pt")["model"] for parts in (1, 4))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=1e-4)


# ---- what goes wrong outside


def test_full_disk(data, tmp_path):
    """A limit on the size of files stands for it: same errors, from the same calls."""
    config = count(data, {"save_every": 2}, 6)
    save, limits = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def limited(*args):
        calls.append(args[1])
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return save(*args)

    try:
        checkpoint.save = limited
        with pytest.raises(SaveError, match=r"step-00000004\.\w+: cannot be written \(File too large\)") as error:
            fit(config, data / "phases.jsonl", tmp_path)
    finally:
        checkpoint.save = save
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the last complete checkpoint is step-00000002.pt" in str(error.value) and "\n" not in str(error.value)
    assert checkpoint.load_latest(tmp_path)[1]["step"] == 2
    assert not list(tmp_path.glob("*.part"))
    fit(config, data / "phases.jsonl", tmp_path)
    assert checkpoint.load_latest(tmp_path)[1]["step"] == 6


@pytest.mark.parametrize("limit", [0, 1000, 30_000])
def test_full_disk_inside_either_file(tmp_path, limit):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = {"w": torch.arange(1000.0)}
    checkpoint.save(tmp_path, 1, {"step": 1}, weights, 3)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(SaveError, match="File too large"):
            checkpoint.save(tmp_path, 2, {"step": 2, "model": torch.zeros(10_000)}, weights, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load_latest(tmp_path)[1] == {"step": 1}


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"step": step}, {}, 3)
    (tmp_path / "step-00000002.pt").write_bytes(b"PK\x03\x04 cut off")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_latest(tmp_path)[1] == {"step": 1}
    assert "step-00000002.pt cannot be read" in caplog.text
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 2 checkpoints can be read"):
        checkpoint.load_latest(tmp_path)


DYING = """
import os, signal, sys
from pathlib import Path
from endomamba.train.data import ClipDataset
from endomamba.train.errors import TrainError
from tests.train.test_loop import count, fit

read = ClipDataset.__getitem__

def dying(self, sample):
    if sample.epoch >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, sample)

ClipDataset.__getitem__ = dying
data, out = map(Path, sys.argv[1:])
config = count(data, {"memory": "clip", "chunk": 0, "workers": 1, "save_every": 1}, 12)
try:
    fit(config, data / "phases.jsonl", out)
except TrainError as error:
    print(f"TrainError: {error}")
"""


def test_a_worker_that_dies(data, tmp_path):
    """In a process of its own: torch raises wherever Python is when it hears of the death, in pytest's own code too."""
    command = [sys.executable, "-c", DYING, str(data), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    told = [line for line in done.stdout.splitlines() if line.startswith("TrainError: ")]
    assert len(told) == 1, done.stdout + done.stderr
    assert re.search(r"a data worker died .*the last checkpoint is step-", told[0])
    assert checkpoint.load_latest(tmp_path)[1]["step"] >= 1


def test_a_worker_that_dies_while_it_hands_a_batch_over(data, tmp_path, monkeypatch):
    """Then the connection ends before torch hears of the death."""

    def breaks(*args, **options):
        for number, batch in enumerate(DataLoader(*args, **options)):
            if number == 2:
                raise ConnectionResetError(104, "Connection reset by peer")
            yield batch

    monkeypatch.setattr("endomamba.train.data.DataLoader", breaks)
    with pytest.raises(
        TrainError, match=r"a data worker died .*went away with a batch.*the last checkpoint is step-0000"
    ):
        fit(count(data, {"save_every": 1}, 6), data / "phases.jsonl", tmp_path)


def test_a_worker_that_dies_while_a_checkpoint_is_written(data, tmp_path, monkeypatch):
    """torch.save then says that its file is not finished."""

    class Dying:
        def __reduce__(self):
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, step, content, *rest: save(path, step, [Dying()], *rest))
    with pytest.raises(TrainError, match=r"a data worker died .*there is no checkpoint yet"):
        fit(count(data, {}, 2), data / "phases.jsonl", tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_undecodable_clips_are_logged_counted_and_stop_the_run_when_too_many(tmp_path, caplog):
    make_data(tmp_path, frames=(9,) * 8)
    (tmp_path / "3.mp4").write_bytes((tmp_path / "3.mp4").read_bytes()[:700])
    config = count(tmp_path, {"memory": "clip", "chunk": 0, "max_bad_share": 0.3}, 8)
    config = with_changes(config, {"eval_every": 1000, "epochs": 2})
    listed = manifest.read(tmp_path / "phases.jsonl")
    manifest.write(tmp_path / "phases.jsonl", listed.classes, [e for e in listed.entries if e.split == "train"])
    with caplog.at_level(logging.WARNING):
        fit(config, tmp_path / "phases.jsonl", tmp_path / "out")
    assert caplog.text.count("3.mp4") == 2
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["undecodable"] == 2
    with pytest.raises(DataError, match=r"more than max_bad_share=0.1 allows, the last: .*3\.mp4"):
        fit(with_changes(config, {"max_bad_share": 0.1}), tmp_path / "phases.jsonl", tmp_path / "strict")


def test_another_run_in_the_folder_is_refused(data, tmp_path):
    config = count(data, {}, 2)
    fit(config, data / "phases.jsonl", tmp_path)
    fit(with_changes(config, {"workers": 1, "log_every": 7}), data / "phases.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"was trained with lr=0.01, this run has 0.1: choose another --out"):
        fit(with_changes(config, {"lr": 0.1}), data / "phases.jsonl", tmp_path)
    listed = manifest.read(data / "phases.jsonl")
    manifest.write(data / "fewer.jsonl", listed.classes, listed.entries[1:])
    with pytest.raises(ValueError, match="was trained on another list of clips"):
        fit(config, data / "fewer.jsonl", tmp_path)


def test_exported_weights_load(data, tmp_path):
    fit(count(data, {}, 2), data / "phases.jsonl", tmp_path)
    model = create_model("endomamba", **TINY, num_classes=2)
    for name in ("step-00000002.safetensors", "final.safetensors"):
        report = load_checkpoint(model, tmp_path / name)
        assert not report.missing and not report.unexpected
    trained = checkpoint.load_latest(tmp_path)[1]["model"]
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


# ---- configuration, rates, groups


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"lr": -1}, "lr must be a number of at least 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"epochs": 0}, "needs 0 < epochs"),
        ({"speed": 1}, "has no field 'speed'; it has model, "),
        ({"clip.speed": 1}, "ClipConfig has no field 'speed'"),
        ({"lr.x": 1}, "lr has no fields"),
        ({"task": "detection"}, "task must be one of"),
        ({"task": "classification"}, "memory='carried' and reset are for tasks by frame"),
        ({"model_options.num_classes": 3}, "num_classes is that of the manifest"),
    ],
)
def test_wrong_configs(changes, why):
    with pytest.raises(ValueError, match=why):
        tiny(**changes)


def test_rates():
    rates = [rate_at(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 < rates[-1] < 0.11
    assert rates[55] == pytest.approx(0.55)


def test_parameter_groups():
    model = create_model("endomamba", **{**TINY, "depth": 4}, num_classes=2)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, 0.05, ("pos_embed", "cls_token", "A_log", "A_b_log"), 0.5)
    told = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(told) == len(names)
    assert told["pos_embed"] == (0.5**5, 0.0) and told["patch_embed.proj.weight"] == (0.5**5, 0.05)
    assert told["layers.0.mixer.in_proj.weight"] == (0.5**4, 0.05) and told["layers.3.mixer.A_log"] == (0.5, 0.0)
    assert told["norm_f.weight"] == (1.0, 0.0) and told["head.weight"] == (1.0, 0.05)
    published = param_groups(model, 0.05, ("mask_token",), 0.85, ("pos_embed",))
    told = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in published for p in group["params"]}
    assert told["pos_embed"] == (0.85**5, 0.05) and told["layers.0.mixer.A_log"] == (1.0, 0.05)
