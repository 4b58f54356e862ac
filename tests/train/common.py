"""A data set of a few coloured clips, tiny models, and real processes that are cheap to start and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("tensorboard")
pytest.importorskip("torchmetrics")

from endomamba.train import finetune, loop, manifest, pretrain
from endomamba.train.config import with_changes
from endomamba.train.data import ClipConfig
from endomamba.train.world import World, start_world
from endomamba.video import write_video

SIZE = 32
TINY = {"embed_dim": 16, "depth": 2, "img_size": SIZE, "d_state": 4, "dt_init": "mamba", "dt_min": 1e-4, "dt_max": 1e-1}
ONE = World(torch.device("cpu"))
# Where runs that are killed train: with ENDOMAMBA_TEST_DEVICE=cuda tests/train/test_resume.py says that of a GPU.
DEVICE = "cuda" if os.environ.get("ENDOMAMBA_TEST_DEVICE") == "cuda" else "cpu"


def draw(path, frames, hue, seed=0):
    """Frame i holds its number in blocks of its left half, which the codec keeps, and a colour in its right half."""
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(frames):
        picture = np.full((SIZE, SIZE, 3), 60 + rng.integers(0, 30), np.uint8)
        picture[:, SIZE // 2 :, hue % 3] = 230
        for bit in range(8):
            picture[4 * bit : 4 * bit + 4, : SIZE // 2] = 255 * (i >> bit & 1)
        pictures.append(picture)
    write_video(path, pictures, gop=6, options={"crf": "10", "threads": "1"})


def number(picture):
    """(h, w, 3) uint8 -> the number that `draw` wrote into it."""
    return sum(int(picture[4 * bit + 2, 4:12].float().mean() > 128) << bit for bit in range(8))


def make_data(folder, frames=(14, 9, 20, 11)):
    """Clips with phases by frame in "train", one in "val"; classes.jsonl: the same with one class a clip."""
    phases, whole = [], []
    for i, count in enumerate(frames):
        draw(folder / f"{i}.mp4", count, i, seed=i)
        split = "val" if i == len(frames) - 1 and len(frames) > 1 else "train"
        runs = ((0, count // 2), (1, count - count // 2))
        phases.append(manifest.Entry(f"{i}.mp4", 0, count, runs, split=split))
        whole.append(manifest.Entry(f"{i}.mp4", 0, count, i % 2, split=split))
    manifest.write(folder / "phases.jsonl", ["a", "b"], phases)
    manifest.write(folder / "classes.jsonl", ["a", "b"], whole)
    return folder


def tiny(**changes):
    """Phases with carried state, fp32, no worker; fields as in FinetuneConfig."""
    base = finetune.FinetuneConfig(
        model="endomamba", model_options=TINY, memory="carried", clip=ClipConfig(frames=4), chunk=2, batch_size=2,
        precision="fp32", lr=1e-2, clip_norm=1.0, workers=0, log_every=3, save_every=2, keep=2,
        deterministic=DEVICE == "cuda",
    )  # fmt: skip
    return with_changes(base, changes)


def steps(config, entries, count):
    """The config with as many epochs as make `count` steps."""
    return with_changes(config, {"epochs": count / finetune._plan(config, entries).per_epoch})


def fit(config, path, out, world=ONE):
    run = pretrain.run if isinstance(config, pretrain.PretrainConfig) else finetune.run
    return run(config, manifest.read(path), out, world)


# ---- processes


def processes():
    """Forked from a server that has imported everything: a fraction of a second each, and no threads to inherit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.common", "torch.utils.tensorboard", "torch._dynamo"])
    return context


def start(target, *args, ranks=1):
    """A process a rank, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        processes().Process(target=_rank, args=(rank, ranks, port, target, args), daemon=False) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    return started


def _rank(rank, ranks, port, target, args):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers; here it would be the server's
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    target(*args)


def finish(started, timeout=120):
    """Waits; as soon as one process fails the others are killed, as torchrun does.  -> exit codes."""
    until = time.monotonic() + timeout
    while any(process.is_alive() for process in started):
        if any(process.exitcode for process in started) or time.monotonic() > until:
            for process in started:
                process.kill()
        time.sleep(0.005)
    return [process.exitcode for process in started]


def train_and_die(config, path, out, kills):
    """Trains; kills: {rank: (step, share)}, SIGKILL when that share of the time of a step has gone by in that step."""
    step, part = kills.get(int(os.environ["RANK"]), (10**9, 0.0))
    update, took = loop._Run._update, [0.02]

    def watched(self, number, batches):
        if number == step:
            threading.Timer(part * min(took), os.kill, (os.getpid(), signal.SIGKILL)).start()
        began = time.monotonic()
        update(self, number, batches)
        took.append(time.monotonic() - began)

    loop._Run._update = watched
    with start_world(DEVICE) as world:
        fit(config, path, out, world)
