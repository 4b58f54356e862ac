"""Named configurations: a recipe is a function that returns one, and `--set FIELD=VALUE` changes it.

Published protocols are given as far as this trainer has their parts, and each says what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from .config import TrainConfig, with_changes
from .data import ClipConfig
from .finetune import FinetuneConfig
from .pretrain import PretrainConfig

LONG_MEMORY = {"dt_init": "mamba", "dt_min": 1e-4, "dt_max": 1e-1}
RECIPES: dict[type[TrainConfig], dict[str, Callable[[], Any]]] = {FinetuneConfig: {}, PretrainConfig: {}}

Recipe = TypeVar("Recipe", bound=Callable[[], TrainConfig])


def recipe(function: Recipe) -> Recipe:
    RECIPES[type(function())][function.__name__.replace("_", "-")] = function
    return function


def find(name: str, changes: dict[str, Any] | None = None, kind: type[TrainConfig] = FinetuneConfig) -> Any:
    """The recipe of that name for a kind of training, with fields changed; ValueError names what there is."""
    there = RECIPES[kind]
    if name not in there:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(sorted(there))}")
    return with_changes(there[name](), changes or {})


@recipe
def polypdiag() -> FinetuneConfig:
    """PolypDiag as published: 8 frames over 256, SGD.  Left out: a rate that stays the same within an epoch."""
    return FinetuneConfig(
        task="classification",
        clip=ClipConfig(frames=8, stride=32, resize="short", decode=(256, 320), crop="random", flip=0.5,
                        normalise="polypdiag"),
        epochs=20, batch_size=4, optimizer="sgd", lr=1.5625e-5, weight_decay=0.0, seed=3, precision="fp32",
        eval_every=43,
    )  # fmt: skip


@recipe
def phase_clips() -> FinetuneConfig:
    """AutoLaparo phases from clips of 32 frames, the published rates and layer decay (on pos_embed alone).

    For frames at 1 a second.  Left out: RandAugment, mixup, cutmix, erasing, and its windows of 32 frames in the test,
    for which reset=32 stands.
    """
    return FinetuneConfig(
        clip=ClipConfig(frames=32, most_stride=3, crop="resized", flip=0.5),
        epochs=50, warmup=5, batch_size=96, clips_per_entry=64, lr=7.5e-5, min_lr=1.5e-6, no_decay=("mask_token",),
        layer_decay=0.85, layer_decay_only=("pos_embed",), label_smoothing=0.1, seed=4, reset=32,
    )  # fmt: skip


@recipe
def phase_videos() -> FinetuneConfig:
    """Phases from whole videos with carried state, 64 frames of gradient: what the published code cannot do."""
    return FinetuneConfig(
        memory="carried", model_options=LONG_MEMORY,
        clip=ClipConfig(frames=64, crop="resized", flip=0.5, jitter=0.2), chunk=16,
        epochs=50, warmup=2, batch_size=8, lr=1e-4, min_lr=1e-6, layer_decay=0.85, label_smoothing=0.1, clip_norm=1.0,
    )  # fmt: skip


@recipe
def cholec80() -> FinetuneConfig:
    """As phase-clips, for the layout cholec80 at 1 picture a second, scored with 10 relaxed seconds too.

    The published scores of relaxed phases have a slip, which published_relaxed=True repeats.
    """
    return replace(phase_clips(), relaxed=10)


@recipe
def m2cai16() -> FinetuneConfig:
    """As cholec80, for the layout m2cai16."""
    return cholec80()


@recipe
def ophnet() -> FinetuneConfig:
    """Ours: phases of whole eye operations with carried state, about 1 frame a second of videos at 25."""
    config = phase_videos()
    return replace(config, clip=replace(config.clip, stride=25))


@recipe
def cholect50() -> FinetuneConfig:
    """Ours: all triplets of a frame from clips of 16 seconds; average precision as published, by video too."""
    return FinetuneConfig(
        task="sets",
        clip=ClipConfig(frames=16, crop="resized", flip=0.5, jitter=0.2),
        epochs=20, warmup=1, batch_size=32, clips_per_entry=64, lr=1e-4, min_lr=1e-6, layer_decay=0.85, clip_norm=1.0,
    )  # fmt: skip


@recipe
def surgical_actions160() -> FinetuneConfig:
    """Ours: an action a clip, 16 frames spread over some 5 seconds."""
    return FinetuneConfig(
        task="classification",
        clip=ClipConfig(frames=16, stride=8, crop="resized", flip=0.5, jitter=0.2),
        epochs=100, warmup=5, batch_size=16, lr=1e-4, min_lr=1e-6, layer_decay=0.85, clip_norm=1.0,
    )  # fmt: skip


@recipe
def ophnet_trimmed() -> FinetuneConfig:
    """Ours: a phase a clip, 16 frames spread over some 5 seconds."""
    return replace(surgical_actions160(), epochs=50, eval_every=2000)


@recipe
def cvc_segmentation() -> FinetuneConfig:
    """CVC-ClinicDB as published: a whole video an update, frames changed independently of each other, its Dice.

    Layout cvc is the published split, whose test videos are mostly in train too; cvc-clean has none in two splits.
    Left out: the second stretching of each picture after it was changed, and decay of vectors.
    """
    return FinetuneConfig(
        task="segmentation",
        clip=ClipConfig(frames=0, decode=(256, 256), crop="random", flip=0.5, turn=5.0, consistent=False, stretch=True,
                        centre=False),
        epochs=150, batch_size=1, lr=1e-4, schedule="poly", weight_decay=0.05, no_decay=(), precision="fp32", seed=11,
        eval_every=20, published_empty=True,
    )  # fmt: skip


@recipe
def synthetic_phases() -> FinetuneConfig:
    """Phases of `endomamba synth` from scratch with carried state, small enough for a laptop."""
    return FinetuneConfig(
        model="endomamba", memory="carried",
        model_options={"embed_dim": 96, "depth": 8, "img_size": 64, "drop_path_rate": 0.0, **LONG_MEMORY},
        clip=ClipConfig(frames=32, flip=0.5, jitter=0.2),
        epochs=30, warmup=1, batch_size=4, lr=1e-3, min_lr=1e-5, clip_norm=1.0, workers=2, save_every=200,
    )  # fmt: skip


def _synthetic(**changes: Any) -> FinetuneConfig:
    """The model of synthetic-phases, reading clips of 16 frames."""
    base = synthetic_phases()
    return replace(base, memory="clip", clip=replace(base.clip, frames=16), clips_per_entry=8, batch_size=8, **changes)


@recipe
def synthetic_masks() -> FinetuneConfig:
    """Polyps of `endomamba synth`, by a decoder an eighth as wide as the published one."""
    config = _synthetic(task="segmentation")
    return with_changes(config, {"model_options.head_width": 64, "clip.crop": "resized"})


@recipe
def synthetic_landmarks() -> FinetuneConfig:
    """The six landmarks of `endomamba synth`."""
    return with_changes(_synthetic(task="localisation"), {"model_options.head_width": 128})


@recipe
def synthetic_polyps() -> FinetuneConfig:
    """Which type of polyp a clip shows, or none; of the layout synth-polyps."""
    return replace(_synthetic(task="classification"), clips_per_entry=1)


@recipe
def endomamba_small() -> PretrainConfig:
    """Pre-training as published, for 6 processes of 48 clips; with one, accumulate=6.  Needs teacher_weights.

    For videos whose shorter side is 256.  Otherwise than published: bf16 instead of fp16, crops anywhere instead of at
    13 places, clips that an epoch leaves over go into the next.
    """
    return PretrainConfig(
        clip=ClipConfig(frames=16, stride=4, resize="short", decode=(256, 256), crop="multi_scale"),
        epochs=500, warmup=40, batch_size=288, lr=1.6875e-4, min_lr=1.125e-5, seed=5,
        save_every=1000, eval_every=1000,
    )  # fmt: skip


@recipe
def synthetic_clips() -> PretrainConfig:
    """For the model of synthetic-phases, without a teacher: its weights go into that recipe's `weights`."""
    return PretrainConfig(
        teacher="", align_weight=0.0, model="endomamba",
        model_options={"embed_dim": 96, "depth": 8, "img_size": 64, "decoder_dim": 64, "decoder_depth": 2,
                       "decoder_heads": 2, "drop_path_rate": 0.0, **LONG_MEMORY},
        clip=ClipConfig(frames=16, crop="resized", flip=0.5),
        epochs=200, warmup=10, batch_size=16, lr=1e-3, min_lr=1e-5, workers=2, save_every=200, eval_every=200,
    )  # fmt: skip


# ---- the smallest model: bench/learns.py compares with it, and one of its trainings lies in the package

NANO = {"embed_dim": 96, "depth": 8, "img_size": 128, "drop_path_rate": 0.0, **LONG_MEMORY}  # 0.68 M parameters


@recipe
def nano_clips() -> PretrainConfig:
    """Pre-training of the nano model on `endomamba synth`, without a teacher, every fourth frame."""
    return PretrainConfig(
        teacher="", align_weight=0.0, model="endomamba",
        model_options={**NANO, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 2},
        clip=ClipConfig(frames=16, stride=4, crop="resized", flip=0.5),
        epochs=200, warmup=20, batch_size=8, lr=1e-3, min_lr=1e-5, clip_norm=1.0,
        workers=2, keep_decoded=4.0, log_every=50, save_every=500,
    )  # fmt: skip


def _nano(**changes: Any) -> FinetuneConfig:
    """Clips as those of nano-clips; pre-trained positions are kept."""
    return FinetuneConfig(
        model="endomamba", model_options=NANO,
        clip=ClipConfig(frames=16, stride=4, crop="resized", flip=0.5, jitter=0.2),
        epochs=100, warmup=10, batch_size=8, lr=1e-3, min_lr=1e-5, clip_norm=1.0, map_pos_embed=True, reset=16,
        workers=2, keep_decoded=4.0, log_every=50, save_every=500,
    )  # fmt: skip


@recipe
def nano_clip_phases() -> FinetuneConfig:
    """Phases from clips of 16 frames, and judged in windows of 16."""
    return _nano()


@recipe
def nano_masks() -> FinetuneConfig:
    """Polyps, by a decoder an eighth as wide as the published one."""
    return with_changes(_nano(), {"task": "segmentation", "model_options.head_width": 64})


@recipe
def nano_landmarks() -> FinetuneConfig:
    """The six landmarks."""
    return with_changes(_nano(), {"task": "localisation", "model_options.head_width": 128})


@recipe
def nano_polyps() -> FinetuneConfig:
    """Which type of polyp 16 successive frames show, or none; of the layout synth-polyps."""
    return with_changes(_nano(), {"task": "classification", "clip.stride": 1, "reset": 0})


@recipe
def nano_carried_phases() -> FinetuneConfig:
    """Phases with carried state: as many frames an update as nano-clip-phases, in half as many streams."""
    config = with_changes(_nano(), {"clip.frames": 32})
    return replace(config, memory="carried", batch_size=4, reset=0)


@recipe
def nano_phases() -> FinetuneConfig:
    """What `endomamba.models.load_pretrained("nano-phases")` was trained by, for `endomamba synth --every 4`.

    Those are the frames that nano-carried-phases reads, drawn and decoded alone; small enough for a CPU.
    """
    config = with_changes(nano_carried_phases(), {"clip.stride": 1, "precision": "fp32"})
    return replace(config, epochs=8, warmup=0.8, log_every=25, save_every=100)
