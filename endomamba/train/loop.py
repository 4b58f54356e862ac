"""One loop for any training: `train(config, model, step, dataset, plan, out)`.

`step(batch)` returns a NamedTuple with `loss` and whatever other scalars are to be logged, by name; where streams are
carried from step to step also `carry`, the state for the next one.  The loop does the rest: processes, precision,
accumulation, clipping, schedule, logging, checkpoints.

Nothing in it asks the device for a value except when logging, evaluating or saving.  A loss or a gradient that is not
finite is found on the device: the step is noted there, the update is left out (by the loss scaler's own means, in every
precision), and so is every one after it, and carried states stay as they were.  The host learns of it at the next log
line at the latest, and by then weights, optimizer and states are still those before the bad step.  As clips, masks and
random numbers are functions of (seed, step), the host can run that step again with every layer watched and say which
was the first to go wrong; late or at once, the report is the same.  With fp16 a gradient that overflows is the scaler's
business, as always; a loss that is not finite is not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.state import CarriedState
from ..ops._nvtx import nvtx_range
from . import checkpoint
from .config import FREE, TrainConfig
from .data import ClipDataset, collate, load, to_device
from .errors import NonFiniteLoss, TrainError, chain
from .manifest import DataError, digest
from .optim import build_optimizer, param_groups, rate_at, set_rate
from .plan import Plan, Shares, share
from .progress import Progress
from .running import restore, running_statistics, share_out
from .watch import Watch
from .world import World

log = logging.getLogger("endomamba")

SMALLEST_SCALE = 2.0**-14  # of the fp16 loss scaler: below it every gradient overflows, whatever the scale
NEVER = 2**62


class _Stepper(nn.Module):
    """Makes `step` the forward of a module with the model's parameters: what DDP wraps."""

    def __init__(self, model: nn.Module, step: Callable[[dict[str, Any]], Any]):
        super().__init__()
        self.model, self._step = model, step

    def forward(self, batch: dict[str, Any]) -> Any:
        return self._step(batch)


def train(
    config: TrainConfig,
    model: nn.Module,
    step: Callable[[dict[str, Any]], Any],
    dataset: ClipDataset,
    plan: Plan,
    out: str | os.PathLike,
    world: World,
    *,
    evaluate: Callable[[], Mapping[str, float | Tensor]] | None = None,
    best: str = "",
    init_carry: Callable[[int], CarriedState] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Trains `model` in place; the same call goes on where `out` was left: to the bit on a CPU with as many threads.

    step: batch -> NamedTuple with a scalar `loss`, a mean over its clips; what else is scalar in it is logged.
    batch: video (b, 3, t, h, w) uint8, label (b, t), fresh (b,), key (b,), samples; carry where there are streams.
    evaluate: called on every process -> metrics, and pictures (h, w, 3) uint8, by name; `best`: the metric whose best
        weights are kept as best.safetensors.
    init_carry: number of streams -> the state before their first frame.
    facts: what the files of weights say of themselves, `models.describe`.

    TrainError, NonFiniteLoss, DataError, SaveError and ValueError, each one sentence.
    """
    run = _Run(config, model, step, dataset, plan, Path(out), world, evaluate, best, init_carry, dict(facts or {}))
    try:
        run()
    except RuntimeError as error:
        died = next((str(e) for e in chain(error) if "DataLoader worker" in str(e)), None)
        if died is None or isinstance(error, TrainError):
            raise
        for e in chain(error):  # what they hold ends the other workers; until then torch raises at any child's end
            traceback.clear_frames(e.__traceback__)
        last = checkpoint.latest_path(Path(out))
        kept = f"the last checkpoint is {last.name}" if last else "there is no checkpoint yet"
        raise TrainError(
            f"a data worker died (out of memory, or killed: {died.splitlines()[0].rstrip('. ')}); {kept}, "
            "start the same command again to go on, with fewer workers if memory was short"
        ) from None


class _Run:
    def __init__(self, config, model, step, dataset, plan, out, world, evaluate, best, init_carry, facts):  # type: ignore[no-untyped-def]
        self.config, self.model, self.step, self.dataset, self.plan = config, model, step, dataset, plan
        self.out, self.world, self.evaluate, self.best, self.facts = out, world, evaluate, best, facts
        parts = world.size * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulate, {world.size} x "
                f"{config.accumulate}"
            )
        self.steps = max(1, round(config.epochs * plan.per_epoch))
        self.warmup = round(config.warmup * plan.per_epoch)
        self.digest = digest(dataset.entries)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        stepper = _Stepper(model, step)
        self.stepper = stepper if world.size == 1 else self._parallel(stepper)
        groups = param_groups(model, config.weight_decay, config.no_decay, config.layer_decay, config.layer_decay_only)
        self.optimizer = build_optimizer(config.optimizer, groups, config.betas)
        half = config.precision == "fp16"
        # Without fp16 its scale is 1 and stays: it is there for its way of leaving an update out without a sync.
        self.scaler = torch.amp.GradScaler(
            world.device.type, init_scale=2.0**16 if half else 1.0, growth_interval=2000 if half else 2**31 - 1
        )
        self.carries = [init_carry(config.batch_size // parts) if init_carry else None] * config.accumulate
        self.bad = torch.full((), NEVER, device=world.device)  # the first step that was not finite
        self.running = running_statistics(model)
        self.sums: dict[str, Tensor] = {}
        self.summed = 0  # steps in them
        self.faults = self.drawn = self.saved = 0
        self.best_value: float | None = None

    def _parallel(self, stepper: nn.Module) -> nn.Module:
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(stepper, ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        first = self.saved = self._resume()
        config = self.config
        with Progress(self.out, first, self.steps, self.world, config) as say:
            batches = self._batches(first)
            self.model.train()
            for step in range(first, self.steps):
                self._update(step, batches)
                done = step + 1
                end = done == self.steps
                logs, saves = end or done % config.log_every == 0, end or done % config.save_every == 0
                judges = self.evaluate is not None and (end or (config.eval_every and done % config.eval_every == 0))
                if logs or saves or judges:
                    self._stop_if_not_finite()
                if logs:
                    say.train(done, self._averages())
                if judges:
                    self._judge(done, say)
                if saves:
                    self._save(done)
        if self.world.rank == 0:
            facts = {"step": str(self.steps)} | self.facts
            checkpoint.save_weights(self.out / "final.safetensors", self.model.state_dict(), facts)

    # ---- an update

    def _update(self, step: int, batches: Iterator[dict[str, Any]]) -> None:
        config = self.config
        self._seed(step)
        set_rate(self.optimizer, rate_at(step, self.steps, self.warmup, config.lr, config.min_lr, config.schedule))
        carries, running = [], [statistic.clone() for statistic in self.running]
        for part in range(config.accumulate):
            with nvtx_range("load"):
                batch = {**self._next(batches), "carry": self.carries[part]}
            wait = part + 1 < config.accumulate and self.world.size > 1
            with self.stepper.no_sync() if wait else contextlib.nullcontext():
                with nvtx_range("forward"), self.config.autocast(self.world.device):
                    output = self.stepper(batch)
                with nvtx_range("backward"):
                    self._backward(step, output.loss)
            self._collect(output)
            carries.append(getattr(output, "carry", None))
        with nvtx_range("clip"):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or float("inf"))
            if config.precision != "fp16":
                self._note(step, norm)
            self.world.reduce(self.bad, dist.ReduceOp.MIN)
            self._add("grad_norm", norm)
        with nvtx_range("step"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        restore(self.running, running, self.bad != NEVER)
        self.carries = [self._commit(*pair) for pair in zip(self.carries, carries)]
        self.summed += 1

    def _seed(self, step: int) -> None:
        """Random numbers of a step are its own: nothing of them has to be saved, and any step can be run again."""
        state = np.random.SeedSequence((self.config.seed, step, self.world.rank)).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))
        torch.manual_seed(int(state[2]))

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        batch = next(batches)
        if "fatal" in batch:
            raise DataError(batch["fatal"])
        self.drawn += len(batch["samples"])
        self.faults += len(batch["faults"])
        for fault in batch["faults"]:
            log.warning("a clip could not be decoded and was replaced: %s", fault)
        of = max(self.drawn, len(self.dataset) // self.world.size)
        if self.faults > self.config.max_bad_share * of:
            raise DataError(
                f"{self.faults} clips of {self.drawn} could not be decoded, more than max_bad_share="
                f"{self.config.max_bad_share:g} allows, the last: {batch['faults'][-1]}; see `endomamba data check`"
            )
        return to_device(batch, self.world.device)

    def _backward(self, step: int, loss: Tensor) -> None:
        self._note(step, loss.detach())
        poison = torch.where(self.bad == NEVER, 1.0, float("nan"))
        self.scaler.scale(loss * (poison / self.config.accumulate)).backward()

    def _note(self, step: int, value: Tensor) -> None:
        self.bad = torch.where((self.bad == NEVER) & ~torch.isfinite(value), step, self.bad)

    def _commit(self, before: CarriedState | None, after: CarriedState | None) -> CarriedState | None:
        if before is None or after is None:
            return after
        keep = {n: torch.where(self.bad == NEVER, getattr(after, n), getattr(before, n)) for n in after.TENSORS}
        return replace(after, **keep)  # type: ignore[type-var]  # every state is a dataclass

    def _collect(self, output: Any) -> None:
        for name, value in output._asdict().items():
            if isinstance(value, Tensor) and value.ndim == 0:
                self._add(name, value.detach() / self.config.accumulate)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.float()

    def _batches(self, first: int) -> Iterator[dict[str, Any]]:
        world, config = self.world, self.config
        shares = Shares(self.plan, first, self.steps, world.rank, world.size, config.accumulate)
        return load(self.dataset, shares, config.workers, pin=world.device.type == "cuda")

    # ---- what the host asks for

    def _averages(self) -> dict[str, float]:
        """Means over the steps since the last time and over all processes; here the host waits for the device."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names])
        faults = self.world.reduce(torch.tensor(float(self.faults), device=self.world.device))
        values = (self.world.reduce(values) / (self.world.size * self.summed)).tolist()
        self.sums, self.summed = {}, 0
        facts = {"lr": max(group["lr"] for group in self.optimizer.param_groups), "undecodable": faults.item()}
        if self.config.precision == "fp16":
            facts["scale"] = self.scaler.get_scale()
        return dict(zip(names, values)) | facts

    def _judge(self, done: int, say: Progress) -> None:
        share_out(self.running, self.world)
        self.model.eval()
        values = self.evaluate()
        self.model.train()
        say.judged(done, values)
        value = values.get(self.best)
        if value is not None and value == value and (self.best_value is None or value > self.best_value):  # not NaN
            self.best_value = value
            if self.world.rank == 0:
                facts = {"step": str(done), self.best: f"{value}"} | self.facts
                checkpoint.save_weights(self.out / "best.safetensors", self.model.state_dict(), facts)

    def _stop_if_not_finite(self) -> None:
        bad = int(self.bad)
        if bad == NEVER:
            if self.config.precision == "fp16" and self.scaler.get_scale() < SMALLEST_SCALE:
                raise NonFiniteLoss("gradients overflow in fp16 at every scale of the loss: use precision='bf16'")
            return
        if bad != self.saved:
            self._save(bad)
        found = [text for text in self.world.gather(self._explain(bad)) if text]
        raise NonFiniteLoss(
            f"step {bad}: the loss or its gradient is not finite; {'; '.join(found) or 'it was, when run again'}; "
            f"the update was not made, step-{bad:08d} holds all before it"
        )

    def _explain(self, step: int) -> str:
        """Runs this process's share of a step again, watching every layer -> what was found, "" where nothing was."""
        world, config = self.world, self.config
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"parameter {name} is not finite itself"
        self._seed(step)
        for part in range(config.accumulate):
            samples = share(self.plan(step), world.rank, world.size, part, config.accumulate)
            clips = ", ".join(self.dataset.describe(sample) for sample in samples)
            batch = to_device(collate([self.dataset[s] for s in samples]), world.device)
            with Watch(self.model) as watch:
                with config.autocast(world.device):
                    loss = self.step({**batch, "carry": self.carries[part]}).loss
                if watch.first or not torch.isfinite(loss):
                    return f"first non-finite layer: {watch.first or 'the loss itself'}; clips: {clips}"
                loss.backward()
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            if watch.first_gradient or wrong:
                at = f"behind {watch.first_gradient}" if watch.first_gradient else f"of {wrong[-1]}"
                return f"first non-finite gradient: {at}; clips: {clips}"
            if gradients and not torch.stack([g.norm() for g in gradients.values()]).norm().isfinite():
                norms = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
                largest = max(norms, key=norms.__getitem__)
                return (
                    f"gradients too large for their norm: most of all {largest}, {norms[largest]:.0e}; clips: {clips}"
                )
        return ""

    # ---- checkpoints

    def _save(self, step: int) -> None:
        share_out(self.running, self.world)
        mine = {
            "carries": [_tensors(carry) for carry in self.carries],
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "counts": [self.summed, self.faults, self.drawn],
        }
        ranks = self.world.gather(mine)
        if self.world.rank == 0:
            content = {
                "step": step,  # with the seed all there is to say about random numbers, order of clips and schedule
                "config": json.loads(json.dumps(asdict(self.config))),
                "data": self.digest,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.config.precision == "fp16" else {},
                "ranks": ranks,
                "best": self.best_value,
            }
            checkpoint.save(self.out, step, content, self.model.state_dict(), self.config.keep, self.facts)
        if self.world.size > 1:
            dist.barrier()
        self.saved = step

    def _resume(self) -> int:
        found = checkpoint.load_latest(self.out)
        if found is None:
            return 0
        path, content = found
        self._check_same(path, content)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.best_value = content["best"]
        if len(content["ranks"]) == self.world.size:  # else only what is logged begins anew
            mine = content["ranks"][self.world.rank]
            self.summed, self.faults, self.drawn = mine["counts"]
            self.sums = {name: value.to(self.world.device) for name, value in mine["sums"].items()}
            device = self.world.device
            self.carries = [_filled(carry, saved, device) for carry, saved in zip(self.carries, mine["carries"])]
        log.info("going on from %s", path)
        return content["step"]

    def _check_same(self, path: Path, content: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(asdict(self.config)))
        for name in [*ours, *content["config"]]:
            old, new = content["config"].get(name), ours.get(name)
            if old != new and name not in FREE:
                raise ValueError(f"{path}: was trained with {name}={old!r}, this run has {new!r}: choose another --out")
        if content["data"] != self.digest:
            raise ValueError(f"{path}: was trained on another list of clips: choose another --out")
        before = len(content["ranks"])
        if self.carries[0] is not None and before != self.world.size:
            raise ValueError(f"{path}: carries the streams of {before} processes, this run has {self.world.size}")


def _tensors(carry: CarriedState | None) -> dict[str, Tensor]:
    return {} if carry is None else {name: getattr(carry, name).cpu() for name in carry.TENSORS}


def _filled(carry: CarriedState | None, saved: dict[str, Tensor], device: torch.device) -> CarriedState | None:
    if carry is None:
        return None
    return replace(carry, **{name: tensor.to(device) for name, tensor in saved.items()})  # type: ignore[type-var]
