"""Masked pre-training of EndoMamba: reconstruct hidden patches, and look like a teacher on the visible ones.

    model = create_model("pretrain_endomamba_small")
    mask = model.config.draw_mask(16, seed=0, key="clip-17")[None]      # (b, t n), True is hidden
    losses = model(video, mask, teacher(video))                         # teacher: models/teacher.py
    losses.loss.backward()

The encoder reads visible patches only.  Its output and a learned token for each hidden patch go through a small ViT,
which answers for the hidden ones.  Names of parameters are those of the published pre-training files.

Source: EndoMamba, arXiv 2502.19090, code at github.com/TianCuteQY/EndoMamba (Apache-2.0), which builds on VideoMAE
(arXiv 2203.12602).  Written anew.

Letters: b clips, t frames, n patches of a frame, v visible and m masked patches of a clip, c channels of the encoder,
e channels of the decoder, p patch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frame_embed import temporal_positions
from ..video import IMAGENET_MEAN, IMAGENET_STD
from ._registry import register_model
from .attention import Mlp, SelfAttention
from .config import EndoMambaConfig, check_int, check_one_of, check_range
from .endomamba import EndoMamba
from .layers import check_video, run_block, take_tokens
from .masking import MASKS, draw_mask, split_places, visible_tokens

PATCH_STD_EPS = 1e-6  # added to the standard deviation of a patch of pixels in [0, 1]


@dataclass(frozen=True)
class PretrainConfig(EndoMambaConfig):
    """The fields of the encoder and those of pre-training; the defaults are the published small model."""

    with_cls_token: bool = False

    mask: str = "tube"  # or "frame" or "random": see masking.py
    mask_ratio: float = 0.75
    align_weight: float = 0.25  # loss = reconstruction + align_weight * alignment
    teacher_dim: int | None = None  # channels of a teacher of another width, which costs a learned projection

    decoder_dim: int = 192
    decoder_depth: int = 4
    decoder_heads: int = 3  # of decoder_dim // decoder_heads channels, so tiny's three have 126 of its 128
    decoder_norm_eps: float = 1e-6  # of the published models; their class's own default is 1e-5

    pixel_mean: tuple[float, ...] = IMAGENET_MEAN  # what videos were normalised with, by channel
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        for name in ("with_cls_token", "num_classes", "head", "hold_position", "dynamic_img_size"):
            default = getattr(PretrainConfig, name)
            if getattr(self, name) != default:
                raise ValueError(f"{who}: {name} has no meaning in pre-training: leave it at {default!r}")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            check_int(who, name, getattr(self, name), 1)
        if self.decoder_dim % 2:
            raise ValueError(f"{who}: decoder_dim must be even (positions are sin, cos pairs), got {self.decoder_dim}")
        if self.decoder_heads > self.decoder_dim:
            raise ValueError(
                f"{who}: decoder_heads must not exceed decoder_dim={self.decoder_dim}, got {self.decoder_heads}"
            )
        check_range(who, "decoder_norm_eps", self.decoder_norm_eps, 0, 1, above=True)
        if self.teacher_dim is not None:
            check_int(who, "teacher_dim", self.teacher_dim, 1)
        check_one_of(who, "mask", self.mask, MASKS)
        check_range(who, "mask_ratio", self.mask_ratio, 0, 1, above=True)
        if self.mask != "random":  # for which the number of frames decides, and that is not known yet
            try:
                self.visible_tokens(1)
            except ValueError as error:
                raise ValueError(f"{who}: {error}") from None
        check_range(who, "align_weight", self.align_weight, 0, math.inf)
        for name, low in (("pixel_mean", -math.inf), ("pixel_std", 0)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            values = getattr(self, name)
            if len(values) != self.in_channels:
                raise ValueError(f"{who}: {name} must have in_channels={self.in_channels} numbers, got {values}")
            for value in values:
                check_range(who, f"each number of {name}", value, low, math.inf, above=True)

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]

    def visible_tokens(self, frames: int) -> int:
        """Patches of a clip of `frames` that the encoder reads."""
        return visible_tokens(self.mask, self.mask_ratio, frames, self.patches)

    def draw_mask(self, frames: int, *, seed: int, key: str | int) -> Tensor:
        """(t n,) bool, True is masked; a function of these arguments alone.  Stack those of a batch."""
        return draw_mask(self.mask, self.mask_ratio, frames, self.patches, seed=seed, key=key)


class PretrainLoss(NamedTuple):
    """loss = reconstruction + align_weight * alignment, each a mean over the batch, fp32."""

    loss: Tensor
    reconstruction: Tensor  # mean squared error of the normalised pixels of hidden patches
    alignment: Tensor | None  # mean of 1 - cosine with the teacher over visible patches; None without a teacher


class Pictures(NamedTuple):
    """Each (b, channels, t, h, w), RGB in [0, 1]."""

    original: Tensor
    masked: Tensor  # hidden patches grey
    reconstruction: Tensor  # hidden patches as the model draws them


class DecoderAttention(SelfAttention):
    """Biases for q and v, none for k; heads of channels // heads, rounded down."""

    def __init__(self, channels: int, heads: int):
        nn.Module.__init__(self)
        self.heads = heads
        inner = channels // heads * heads
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(inner, channels)

    def project(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return F.linear(x, self.qkv.weight, bias)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, channels: int, heads: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps)
        self.attn = DecoderAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps)
        self.mlp = Mlp(channels, 4 * channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A ViT over all patches, visible and masked, that answers for the last ones."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.gradient_checkpointing = config.use_checkpoint
        channels, heads, eps = config.decoder_dim, config.decoder_heads, config.decoder_norm_eps
        self.blocks = nn.ModuleList(DecoderBlock(channels, heads, eps) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(channels, eps)
        self.head = nn.Linear(channels, config.patch_size**2 * config.in_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, answers: int) -> Tensor:
        """(b, v + m, e) -> the pixels of the last `answers` tokens (b, m, p p 3)."""
        for block in self.blocks:
            tokens = run_block(self.gradient_checkpointing, block, tokens)
        return self.head(self.norm(tokens[:, -answers:]))


class PretrainEndoMamba(nn.Module):
    """`model(video, mask, teacher_features)` gives the loss and its parts; `model.encoder` is the EndoMamba to keep.

    Every shape follows from the config and the frames, never from the content of a mask: nothing waits for a GPU.
    """

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        c, e = config.embed_dim, config.decoder_dim
        self.encoder = EndoMamba(config)
        self.encoder_to_decoder = nn.Linear(c, e, bias=False)
        if config.teacher_dim is not None:
            self.encoder_to_teacher = nn.Linear(c, config.teacher_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, e))
        self.decoder = Decoder(config)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the blocks of encoder and decoder are computed again in backward; may be switched at any time."""
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def forward(self, video: Tensor, mask: Tensor, teacher_features: Tensor | None = None) -> PretrainLoss:
        """video: (b, 3, t, h, w), normalised  mask: (b, t n) bool, True is masked, see `PretrainConfig.draw_mask`
        teacher_features: (b, t n, c), of the whole clip, without a gradient; None trains on reconstruction alone.
        """
        self._check(video, mask, teacher_features)
        visible, masked = split_places(mask, self.config.visible_tokens(video.shape[2]))
        features, predicted = self._predict(video, visible, masked)
        target, _, _ = self._target(video, masked)
        loss = reconstruction = F.mse_loss(predicted.to(target.dtype), target)
        alignment = None
        if teacher_features is not None:
            if self.config.teacher_dim is not None:
                features = self.encoder_to_teacher(features)
            alignment = alignment_loss(features, take_tokens(teacher_features, visible))
            loss = reconstruction + self.config.align_weight * alignment
        return PretrainLoss(loss, reconstruction, alignment)

    def predict(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-> the encoder's normalised visible tokens (b, v, c) and the decoder's answer for the masked (b, m, p p 3),
        each in the order of the patches; a patch is row by row, colours together.
        """
        self._check(video, mask, None)
        return self._predict(video, *split_places(mask, self.config.visible_tokens(video.shape[2])))

    @torch.no_grad()
    def reconstruct(self, video: Tensor, mask: Tensor) -> Pictures:
        """What the model makes of masked clips, as pictures; in eval mode, so that it draws no random number.

        A prediction is normalised by patch: mean and contrast of each hidden patch are those of the original.
        """
        self._check(video, mask, None)
        visible, masked = split_places(mask, self.config.visible_tokens(video.shape[2]))
        training = self.training
        self.eval()
        try:
            _, predicted = self._predict(video, visible, masked)
        finally:
            self.train(training)
        _, mean, std = self._target(video, masked)
        patches = to_patches(video.to(mean.dtype), self.config.patch_size)
        channels = patches.shape[-1]
        drawn = predicted.to(mean.dtype).unflatten(-1, (-1, channels)) * std + mean
        original = self._in_colour(patches)
        grey = torch.where(mask[..., None, None], 0.5, original)
        places = masked[..., None, None].expand(-1, -1, *patches.shape[2:])
        drawn = original.scatter(1, places, self._in_colour(drawn).clamp(0, 1))
        return Pictures(*(from_patches(x, self.config.grid) for x in (original, grey, drawn)))

    def _predict(self, video: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder.forward_visible(video, visible).flatten(1, 2)
        index = torch.arange(visible.shape[1] + masked.shape[1], device=video.device)
        positions = temporal_positions(index, self.config.decoder_dim).unsqueeze(0)
        shown = self.encoder_to_decoder(features) + take_tokens(positions, visible)
        hidden = self.mask_token + take_tokens(positions, masked)
        tokens = torch.cat((shown.to(hidden.dtype), hidden), dim=1).to(self.mask_token.dtype)
        return features, self.decoder(tokens, masked.shape[1])

    @torch.no_grad()
    def _target(self, video: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> the normalised pixels of the masked patches (b, m, p p 3), and what undoes it for `video`'s own pixels:
        mean and std, (b, m, 1, 3).

        Published for pixels in [0, 1]: (x - mean) / (std + 1e-6) by patch and colour.  Mean and std of a video's
        normalisation cancel out of it, but for that 1e-6.
        """
        patches = to_patches(video, self.config.patch_size)
        pixels = torch.unflatten(take_tokens(patches.flatten(2), masked), -1, patches.shape[2:])
        var, mean = torch.var_mean(pixels.to(at_least_fp32(video)), dim=2, keepdim=True)
        scales = self.config.pixel_std
        std = torch.cat([s + PATCH_STD_EPS / scale for s, scale in zip(var.sqrt().split(1, -1), scales)], dim=-1)
        return ((pixels - mean) / std).flatten(2), mean, std

    def _in_colour(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (..., 3) -> RGB in [0, 1]."""
        mean, std = (pixels.new_tensor(x) for x in (self.config.pixel_mean, self.config.pixel_std))
        return (pixels * std + mean).clamp(0, 1)

    def _check(self, video: Tensor, mask: Tensor, teacher_features: Tensor | None) -> None:
        who, config = type(self).__name__, self.config
        check_video(who, video, config, self.mask_token.device)
        b, t, length = video.shape[0], video.shape[2], video.shape[2] * config.patches
        if mask.dtype != torch.bool or tuple(mask.shape) != (b, length):
            raise ValueError(
                f"{who}: mask must be bool of shape (b, t n) = {(b, length)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if mask.device != video.device:
            raise ValueError(f"{who}: mask is on {mask.device}, video on {video.device}")
        groups = 1 if config.mask == "random" else t
        each = config.visible_tokens(t) // groups
        right = (torch.unflatten(~mask, 1, (groups, -1)).sum(-1) == each).all()
        where = "clip" if config.mask == "random" else "frame"
        problem = (
            f"{who}: mask must leave {each} patches of each {where} visible (mask={config.mask!r}, "
            f"mask_ratio={config.mask_ratio}), this one does not: draw it with config.draw_mask"
        )
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            if not right:
                raise ValueError(problem)
        else:
            torch._assert_async(right, problem)  # asks the GPU without waiting for it
        if teacher_features is None:
            if config.teacher_dim is not None and torch.is_grad_enabled() and self.training:
                raise ValueError(f"{who}: teacher_dim={config.teacher_dim} is set, so teacher_features are needed")
            return
        channels = config.embed_dim if config.teacher_dim is None else config.teacher_dim
        expected, got = (b, length, channels), tuple(teacher_features.shape)
        if got != expected:
            hint = ""
            if got[:2] == expected[:2] and len(got) == 3:
                hint = f"; for a teacher of another width create the model with teacher_dim={got[2]}"
            raise ValueError(
                f"{who}: teacher_features must be a vector for each patch of the clips, (b, t n, c) = {expected}, "
                f"got {got}{hint}"
            )
        if teacher_features.requires_grad:
            raise ValueError(
                f"{who}: teacher_features carry a gradient, and a teacher that learns would move to the student: "
                "use models.Teacher, or compute them under torch.no_grad()"
            )


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(..., c), (..., c) -> the mean of 1 - cosine, in fp32."""
    student, teacher = student.to(at_least_fp32(student)), teacher.to(at_least_fp32(teacher))
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def at_least_fp32(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def to_patches(video: Tensor, p: int) -> Tensor:
    """(b, 3, t, h, w) -> (b, t n, p p, 3): patches frame by frame and row by row, so their pixels."""
    patches = video.unfold(3, p, p).unfold(4, p, p)  # (b, 3, t, h/p, w/p, p, p)
    return patches.permute(0, 2, 3, 4, 5, 6, 1).flatten(4, 5).flatten(1, 3)


def from_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_patches`."""
    p = int(patches.shape[2] ** 0.5)
    pixels = patches.unflatten(2, (p, p)).unflatten(1, (-1, *grid))  # (b, t, h/p, w/p, p, p, 3)
    return pixels.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


@register_model
def pretrain_endomamba(**options: Any) -> PretrainEndoMamba:
    """Any size: every field of PretrainConfig is an option."""
    return PretrainEndoMamba(PretrainConfig(**options))


@register_model
def pretrain_endomamba_tiny(**options: Any) -> PretrainEndoMamba:
    """7.5 M parameters, decoder included."""
    return pretrain_endomamba(**{"embed_dim": 192, "depth": 24, "decoder_dim": 128, "decoder_heads": 3, **options})


@register_model
def pretrain_endomamba_small(**options: Any) -> PretrainEndoMamba:
    """26.5 M parameters, decoder included; the published recipe's."""
    return pretrain_endomamba(**{"embed_dim": 384, "depth": 24, "decoder_dim": 192, "decoder_heads": 3, **options})


@register_model
def pretrain_endomamba_middle(**options: Any) -> PretrainEndoMamba:
    """78.9 M parameters, decoder included."""
    return pretrain_endomamba(**{"embed_dim": 576, "depth": 32, "decoder_dim": 384, "decoder_heads": 6, **options})
