"""Masked pre-training: clips without labels, a student that fills in what is hidden, and a frozen teacher or none.

The student is `create_model("pretrain_" + config.model)`: models/pretrain.py has the losses, models/masking.py the
masks, models/teacher.py the teachers.  Its weights, step-*.safetensors and final.safetensors, are read by
`load_checkpoint`: whole into a student, the encoder alone into an EndoMamba, so `endomamba finetune` takes them as
`weights`.

Letters: b clips, t frames, n patches of a frame, c channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Pictures, PretrainEndoMamba, PretrainLoss, Teacher, list_models, load_teacher
from ..models.masking import MASKS
from ..video import NORMALISATIONS
from .config import TrainConfig, create
from .data import ClipDataset, Normalise, check_number, left_out, load
from .loop import train
from .manifest import DataError, Manifest
from .plan import ClipPlan, Sample
from .world import World

# Options of the student that are decided by fields here.
DECIDED = ("mask", "mask_ratio", "align_weight", "teacher_dim", "pixel_mean", "pixel_std")
SHOWN = 2, 8  # clips and frames in a picture of reconstructions


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """model: the encoder's name; model_options: fields of `models.PretrainConfig`, img_size and decoder included."""

    mask: str = "tube"  # or "frame" or "random"
    mask_ratio: float = 0.75
    align_weight: float = 0.25  # loss = reconstruction + align_weight * alignment; 0: the teacher is left out
    teacher: str = "videomamba_small"  # a model, or a .pt2 file of torch.export for the clips of a process; "": none
    teacher_weights: str = ""  # of a model
    teacher_options: dict[str, Any] = field(default_factory=dict)  # of `load_teacher`: depth, extra_tokens
    teacher_dim: int = 0  # channels of a teacher of another width, which costs a learned projection; 0: the student's
    no_decay: tuple[str, ...] = ("mask_token",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in MASKS:
            raise ValueError(f"PretrainConfig: mask must be one of {MASKS}, got {self.mask!r}")
        check_number(self, "mask_ratio", float, 0, 1)
        check_number(self.clip, "frames", int, 1)
        check_number(self, "align_weight", float, 0)
        check_number(self, "teacher_dim", int, 0)
        for name in DECIDED:
            if name in self.model_options:
                of = "clip.normalise" if name.startswith("pixel") else name
                raise ValueError(f"PretrainConfig: {name} is decided by the field {of}, not by model_options")
        if self.align_weight and not self.teacher:
            raise ValueError(f"PretrainConfig: align_weight={self.align_weight:g} needs a teacher: name one, or set 0")
        if self.teacher_weights and (not self.teacher or self.teacher.endswith(".pt2")):
            what = "a .pt2 file has its own" if self.teacher else "there is none"
            raise ValueError(f"PretrainConfig: teacher_weights are for a teacher that is a model; {what}")


class MaskedClips(ClipDataset):
    """Its clips have also mask (t n,) bool, and readable () bool: whether the clip itself could be decoded.

    The worker draws the mask, from the seed and the key of the sample (which holds the epoch): the training process
    reads nothing back from the device for it.
    """

    def __init__(self, config: PretrainConfig, model: PretrainEndoMamba, manifest: Manifest, entries: Any):
        super().__init__(manifest, entries, config.clip, model.config.size[0], config.seed, keep=config.keep_decoded)
        self.draw: Callable[..., Tensor] = partial(model.config.draw_mask, config.clip.frames, seed=config.seed)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        item = super().__getitem__(sample)
        if "fatal" in item:
            return item
        return item | {"mask": self.draw(key=int(item["key"])), "readable": torch.tensor(not item["faults"])}


# ---- the step


def masked_step(
    model: PretrainEndoMamba, teacher: Teacher | None, normalise: Normalise, batch: dict[str, Any]
) -> PretrainLoss:
    """The teacher reads the whole clip in a precision of its own, the student what the mask leaves."""
    video = normalise(batch["video"])
    return model(video, batch["mask"], None if teacher is None else teacher(video))


def run(config: PretrainConfig, manifest: Manifest, out: str | os.PathLike, world: World) -> dict[str, Any]:
    """Trains on the split "train", evaluates on "val" where there is one; -> the last evaluation, with its picture."""
    torch.manual_seed(config.seed)
    model = build(config).to(world.device)
    dataset = MaskedClips(config, model, manifest, manifest.split("train"))
    teacher = build_teacher(config, model, _clips(config, world), world.device)
    step = partial(masked_step, model, teacher, Normalise(config.clip.normalise, world.device))
    result: dict[str, Any] = {}

    def judge() -> dict[str, Any]:
        result.update(evaluate(config, model, teacher, manifest, world))
        return result

    plan = ClipPlan(len(dataset), config.batch_size, config.seed)
    train(config, model, step, dataset, plan, out, world, evaluate=judge)
    return result


def _clips(config: PretrainConfig, world: World) -> int:
    """That a process reads at a time."""
    return max(1, config.batch_size // (world.size * config.accumulate))


def build(config: PretrainConfig) -> PretrainEndoMamba:
    """The student, for clips as the config cuts them."""
    names = [name.removeprefix("pretrain_") for name in list_models("pretrain_*")]
    if config.model not in names:
        raise ValueError(f"model must be one of {', '.join(names)} to be pre-trained, got {config.model!r}")
    decided: dict[str, Any] = {"mask": config.mask, "mask_ratio": config.mask_ratio}
    decided |= {f"pixel_{name}": value for name, value in NORMALISATIONS[config.clip.normalise].items()}
    if config.align_weight:
        decided |= {"align_weight": config.align_weight, "teacher_dim": config.teacher_dim or None}
    model: PretrainEndoMamba = create(f"pretrain_{config.model}", {**config.model_options, **decided})
    model.config.visible_tokens(config.clip.frames)  # ValueError where this mask does not go with the frames
    return model


# ---- the teacher


def build_teacher(config: PretrainConfig, model: PretrainEndoMamba, clips: int, device: torch.device) -> Teacher | None:
    """The teacher, tried out on so many black clips; ValueError where its answer does not fit the student."""
    if not config.align_weight:
        return None
    source, options = config.teacher, dict(config.teacher_options)
    if not source.endswith(".pt2"):
        if not config.teacher_weights:
            raise ValueError(f"teacher {source} needs teacher_weights, a file; align_weight=0 trains without a teacher")
        defaults = {"img_size": model.config.img_size}
        if source.startswith("videomamba"):
            defaults["num_frames"] = config.clip.frames
        options = {**defaults, **options}
    try:
        teacher = load_teacher(source, config.teacher_weights or None, device=device, **options)
    except TypeError as error:
        raise ValueError(f"teacher_options: {str(error).partition(' ')[2]}") from None
    _try_out(config, model, teacher, torch.zeros(clips, 3, config.clip.frames, *model.config.size, device=device))
    return teacher


def _try_out(config: PretrainConfig, model: PretrainEndoMamba, teacher: Teacher, video: Tensor) -> None:
    shape, frames = tuple(video.shape), video.shape[2]
    try:
        _, tokens, channels = teacher(video).shape
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"teacher {config.teacher} cannot read the clips of a process, {shape}: {first}") from error
    wanted = config.teacher_dim or model.config.embed_dim
    if channels != wanted:
        now = f"teacher_dim is {wanted}" if config.teacher_dim else f"the student has {wanted}"
        raise ValueError(f"teacher {config.teacher} gives {channels} channels, {now}: set teacher_dim={channels}")
    if tokens != frames * model.config.patches:
        raise ValueError(
            f"teacher {config.teacher} gives {tokens // frames} patches a frame, the student has "
            f"{model.config.patches}: both must cut {shape[3]} x {shape[4]} pixels into the same patches"
        )


# ---- evaluation


@torch.no_grad()
def evaluate(
    config: PretrainConfig, model: PretrainEndoMamba, teacher: Teacher | None, manifest: Manifest, world: World
) -> dict[str, Any]:
    """The losses over the first frames of each clip of "val", always under the same masks, and `reconstructions`: a
    picture, on the first process.  Without that split the picture alone, of clips of "train".
    """
    listed = tuple(entry for entry in manifest.entries if entry.split == "val")
    dataset = MaskedClips(config, model, manifest, listed or manifest.split("train")[: SHOWN[0]])
    dataset.train = False
    samples = [Sample(i, 0, i, start=0) for i in range(world.rank, len(dataset), world.size)]
    size, normalise = _clips(config, world), Normalise(config.clip.normalise, world.device)
    pictures: dict[str, Tensor] = {}
    sums: dict[str, float] = {"clips": 0, "unreadable": 0}
    for batch in load(dataset, [samples[i : i + size] for i in range(0, len(samples), size)], config.workers, False):
        left_out(batch)
        rows = batch["readable"]
        clips = int(rows.sum())
        sums["clips"], sums["unreadable"] = sums["clips"] + clips, sums["unreadable"] + len(rows) - clips
        if not clips:
            continue
        video, mask = normalise(batch["video"][rows].to(world.device)), batch["mask"][rows].to(world.device)
        with config.autocast(world.device):
            if world.rank == 0 and not pictures:
                pictures["reconstructions"] = strip(model.reconstruct(video[: SHOWN[0]], mask[: SHOWN[0]]))
            # A teacher from a file may read one number of clips only.
            features = None if teacher is None else teacher(F.pad(video, (0, 0) * 4 + (0, size - clips)))[:clips]
            losses = model(video, mask, features)
        for name, value in losses._asdict().items():
            if value is not None:
                sums[name] = sums.get(name, 0.0) + clips * value.item()
    return (_means(world.gather(sums), manifest) if listed else {}) | pictures


def _means(sums: Sequence[dict[str, float]], manifest: Manifest) -> dict[str, float]:
    """Of all processes, some of which may have read nothing."""
    clips, lost = (sum(of_rank[name] for of_rank in sums) for name in ("clips", "unreadable"))
    if not clips:
        raise DataError(f"{manifest.path}: no clip of split 'val' could be decoded")
    names = [name for name in max(sums, key=len) if name not in ("clips", "unreadable")]
    return {name: sum(of_rank.get(name, 0.0) for of_rank in sums) / clips for name in names} | {"unreadable": lost}


def strip(pictures: Pictures) -> Tensor:
    """-> (h, w, 3) uint8 on the CPU: below each other original, masked and reconstruction of each clip, frames side by
    side."""
    rows = torch.stack(pictures, 1)  # (b, 3, 3, t, h, w)
    frames = torch.linspace(0, rows.shape[3] - 1, min(rows.shape[3], SHOWN[1])).round().long()
    rows = (rows[:, :, :, frames] * 255).round().to(torch.uint8).permute(0, 1, 4, 3, 5, 2)
    return rows.flatten(0, 2).flatten(1, 2).cpu()
