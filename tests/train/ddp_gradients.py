"""Run by torchrun: one update of each kind of training, its gradients written by the first process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from endomamba.train import loop
from endomamba.train.world import start_world

from .common import fit, tiny

CLIPS = {"memory": "clip", "chunk": 0}
CASES = {
    "classification": {"task": "classification", "clip.flip": 0.5, "clip.crop": "resized", **CLIPS},
    "phase": {"accumulate": 2, **CLIPS},
    "carried": {"clip.frames": 6, "clip.jitter": 0.3},
}


def gradients(case, data, out, world):
    """{parameter: gradient} of the second update, so that streams carry a state into it."""
    config = tiny(batch_size=4, epochs=2, save_every=1000, **CASES[case])
    found, build = [], loop.build_optimizer

    def watched(*args):
        optimizer = build(*args)
        optimizer.register_step_pre_hook(lambda *_: found.append([p.grad.clone() for p in parameters(optimizer)]))
        return optimizer

    loop.build_optimizer = watched
    name = "classes.jsonl" if config.task == "classification" else "phases.jsonl"
    fit(config, data / name, out / f"{case}-{world.size}", world)
    loop.build_optimizer = build
    return found[1]


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    with start_world("cpu") as world:
        result = {case: gradients(case, data, out, world) for case in CASES}
        if world.rank == 0:
            torch.save(result, out / "two.pt")
