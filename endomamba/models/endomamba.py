"""EndoMamba: spatial blocks that read each frame both ways, then temporal blocks that read the video forwards.

Letters: b clips or streams, t frames, n tokens of a frame (cls first), c channels, k classes, d inner channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import BlockWeights, frame_blocks, frame_embed, frame_head, pack_block
from ..ops._backend import named_or_auto
from ..ops.frame_embed import temporal_positions
from ._registry import register_model
from .config import EndoMambaConfig
from .heads import ClassificationHead, PhaseHead, build_head
from .layers import (
    NORM_EPS,
    PatchEmbed,
    RMSNorm,
    SpatialBlock,
    TemporalBlock,
    check_video,
    init_weights,
    resize_positions,
    run_block,
    take_tokens,
)
from .mixer import BidirectionalMixer, CausalMixer
from .state import StreamState


class FrameWeights(NamedTuple):
    """The weights of `step_` as its kernels read them; see `EndoMamba.frame_weights`."""

    patch: Tensor  # (c, 3, p, p), channels last
    spatial: tuple[BlockWeights, ...]
    temporal: tuple[BlockWeights, ...]
    # Of a Linear on pooled tokens, in fp32: weight (k, c), times that of the norm before it, and bias (k,)
    head: tuple[Tensor, Tensor] | None


def _pack(block: SpatialBlock | TemporalBlock) -> BlockWeights:
    mixer = block.mixer
    directions = [mixer.parameters_forward()]
    if isinstance(mixer, BidirectionalMixer):
        directions.append(mixer.parameters_backward())
    return pack_block(block.norm.weight, mixer.in_proj.weight, directions, mixer.out_proj.weight)


def _wide(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.detach().to(dtype, copy=True)


class EndoMamba(nn.Module):
    """`model(video)` reads a clip at once; `init_state` and `step` read it in pieces of any length, to the same result.

    No method but `load_state_dict` and its kin changes the model, so threads may share it, each with its own state.
    """

    def __init__(self, config: EndoMambaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = config.use_checkpoint  # may be switched at any time
        c, backend = config.embed_dim, config.backend
        rows, columns = config.grid
        self.patch_embed = PatchEmbed(config.in_channels, c, config.patch_size)
        if config.with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.with_cls_token + rows * columns, c))
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.layers = nn.ModuleList(self._block(i) for i in range(config.depth))
        self.norm_f = RMSNorm(c, backend)
        self.head = build_head(config)
        init_weights(self, config)

    def _block(self, i: int) -> nn.Module:
        config = self.config
        drop_path = config.drop_path_of(i)
        sizes = (config.embed_dim, config.inner_dim, config.d_state, config.rank, config.d_conv, config.backend)
        if i < config.spatial_layers:
            return SpatialBlock(BidirectionalMixer(*sizes), config.embed_dim, drop_path, config.backend)
        return TemporalBlock(CausalMixer(*sizes), config.embed_dim, drop_path, config.backend)

    # ---- a clip at once

    def forward(self, video: Tensor) -> Tensor | dict[str, Tensor]:
        """video: (b, 3, t, h, w), normalised -> one vector a frame: logits (b, t, k), or features (b, t, c) with k = 0.

        With head="segmentation" {"mask": (b, t, h, w)}, with "localisation" {"landmarks": (b, t, K, 3)}, see heads.py.
        Every head answers per frame.  A frame's vector depends on the frames up to it, never on later ones.
        """
        return self.head(self.forward_features(video))

    def classify(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> logits of the whole clip (b, k); needs head="classification"."""
        if not isinstance(self.head, ClassificationHead):
            raise ValueError(
                "EndoMamba.classify: this model has no classification head; "
                "create it with head='classification' and num_classes >= 1"
            )
        return self.head.clip(self.forward_features(video))

    def forward_features(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> the normalised tokens of every frame (b, t, n, c)."""
        return self.forward_intermediates(video)[0]

    def forward_intermediates(self, video: Tensor) -> tuple[Tensor, list[Tensor]]:
        """-> features (b, t, n, c) and the taps: the mixer outputs of blocks D/3, 2D/3 and D - 1, each (b, t, n, c).

        A tap is a branch before it joins the residual, not normalised.
        """
        self._check_video(video)
        return self._read(self._embed(video, torch.arange(video.shape[2], device=video.device)))

    def patch_tokens(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> `forward_features` without cls, (b, t, n, c): what a teacher gives."""
        return self.forward_features(video)[:, :, int(self.config.with_cls_token) :]

    def forward_visible(self, video: Tensor, visible: Tensor) -> Tensor:
        """`forward_features` of a clip of which only some patches are read, as in masked pre-training.

        visible: (b, v) int64, places in a clip's (t n) patches, in order; v is a multiple of t.  -> (b, t, v / t, c).
        Row i of the result is the i-th t-th of the visible: frame i where every frame shows as many.
        """
        if self.config.with_cls_token:
            raise ValueError("EndoMamba.forward_visible: needs with_cls_token=False, pre-training has no cls token")
        self._check_video(video)
        tokens = self._embed(video, torch.arange(video.shape[2], device=video.device))
        shown = torch.unflatten(take_tokens(tokens.flatten(1, 2), visible), 1, (video.shape[2], -1))
        return self._read(shown)[0]

    # ---- a stream in pieces

    def init_state(self, batch_size: int = 1, device: torch.device | str | None = None) -> StreamState:
        """The state of `batch_size` streams before their first frame."""
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.init_state: batch_size must be at least 1, got {batch_size}")
        device = self.pos_embed.device if device is None else torch.device(device)
        shapes, dtype = self._state_shapes(batch_size), self._state_dtype()
        with torch.inference_mode(False):  # or `step_` could not change it outside of the caller's inference mode
            return StreamState(
                conv=torch.zeros(shapes["conv"], dtype=dtype, device=device),
                ssm=torch.zeros(shapes["ssm"], dtype=dtype, device=device),
                frame=torch.zeros(shapes["frame"], dtype=torch.int64, device=device),
                model=self.config.fingerprint,
            )

    def step(self, frames: Tensor, state: StreamState) -> tuple[Tensor | dict[str, Tensor], StreamState]:
        """The next t >= 1 frames of each stream, (b, 3, t, h, w) -> what `forward` returns for them, and the new state.

        Functional and differentiable, through the state too; `state` stays as it was.
        """
        features, state = self.step_features(frames, state)
        return self.head(features), state

    def step_features(self, frames: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """`step` before the head: features (b, t, n, c) and the new state."""
        self._check_video(frames)
        self._check_state(frames, state)
        hidden, residual = self._embed(frames, self._frame_numbers(frames, state)), None
        for spatial in self.spatial_blocks:
            hidden, residual = self._run(spatial, hidden, residual)
        conv, ssm = [*state.conv], [*state.ssm]
        for i, temporal in enumerate(self.temporal_blocks):
            hidden, residual, conv[i], ssm[i] = self._run(temporal.step, hidden, residual, conv[i], ssm[i])
        features, _ = self.norm_f(hidden, residual)
        after = replace(
            state,
            conv=torch.stack(conv) if conv else state.conv,
            ssm=torch.stack(ssm) if ssm else state.ssm,
            frame=state.frame + frames.shape[2],
        )
        return features, after

    def frame_weights(self) -> FrameWeights:
        """What `step_` reads, packed once: a copy, that does not see what the weights become later."""
        head, wide = self.head, self._state_dtype()
        pooled = type(head) in (PhaseHead, ClassificationHead)  # one made out of them may do more
        return FrameWeights(
            self.patch_embed.proj.weight.detach().squeeze(2).to(memory_format=torch.channels_last, copy=True),
            *(tuple(_pack(block) for block in blocks) for blocks in (self.spatial_blocks, self.temporal_blocks)),
            (_wide(head.weight, wide) * _wide(self.norm_f.weight, wide), _wide(head.bias, wide)) if pooled else None,
        )

    def step_(
        self,
        frames: Tensor,
        state: StreamState,
        normalisation: tuple[Tensor, Tensor] | None = None,
        weights: FrameWeights | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """`step` for inference: returns what `forward` returns and overwrites `state`, allocating no new one.

        normalisation: scale and shift of `endomamba.preprocess.normalisation`, on the model's device; then `frames` is
        the next picture of each stream as it is, uint8 (b, h, w, 3) of a size that the model takes.
        weights: of `frame_weights`; then all blocks run in the fused kernels of `endomamba.ops.frame_blocks`.
        No host synchronisation, so a CUDA graph can hold it.  RuntimeError where gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "EndoMamba.step_ overwrites its state and has no gradient: call it under torch.inference_mode() or "
                "torch.no_grad(), or use step, which returns the state"
            )
        if weights is not None:
            return self._step_packed(frames, state, normalisation, weights)
        hidden, residual = self._embed_next(frames, state, normalisation), None
        for spatial in self.spatial_blocks:
            hidden, residual = spatial(hidden, residual)
        for temporal, conv, ssm in zip(self.temporal_blocks, state.conv, state.ssm, strict=True):
            hidden, residual = temporal.step_(hidden, residual, conv, ssm)
        state.frame.add_(hidden.shape[1])
        features, _ = self.norm_f(hidden, residual)
        return self.head(features)

    def _step_packed(
        self,
        frames: Tensor,
        state: StreamState,
        normalisation: tuple[Tensor, Tensor] | None,
        weights: FrameWeights,
    ) -> Tensor | dict[str, Tensor]:
        residual = self._embed_next(frames, state, normalisation, weights.patch).to(state.ssm.dtype)
        backend = self.config.backend
        frame_blocks(residual.flatten(0, 1), weights.spatial, eps=NORM_EPS, backend=backend)
        frame_blocks(residual.flatten(1, 2), weights.temporal, state.conv, state.ssm, eps=NORM_EPS, backend=backend)
        state.frame.add_(residual.shape[1])
        if weights.head is None:
            features, _ = self.norm_f(residual, None)
            return self.head(features.to(self.pos_embed.dtype))
        logits = frame_head(
            residual.flatten(0, 1), *weights.head, pool=self.head.pool, eps=NORM_EPS, out_dtype=self.pos_embed.dtype,
            backend=named_or_auto("frame_head", backend),
        )  # fmt: skip
        return logits.unflatten(0, residual.shape[:2])

    def _embed_next(
        self,
        frames: Tensor,
        state: StreamState,
        normalisation: tuple[Tensor, Tensor] | None,
        patch: Tensor | None = None,
    ) -> Tensor:
        """Tokens (b, t, n, c) of what `step_` is given; of pictures in one op, which no gradient passes.

        patch: its weight packed, (c, 3, p, p) channels last; then tokens of pictures are not rounded to the model's
        dtype.
        """
        if normalisation is None:
            self._check_video(frames)
            self._check_state(frames, state)
            return self._embed(frames, self._frame_numbers(frames, state))
        video = frames.movedim(-1, 1).unsqueeze(2)  # a view, for its shape
        self._check_video(video, pictures=True)
        self._check_state(frames, state)
        proj, p = self.patch_embed.proj, self.config.patch_size
        positions = resize_positions(self.pos_embed, self.config.grid, (video.shape[3] // p, video.shape[4] // p))
        tokens = frame_embed(
            frames,
            proj.weight.squeeze(2) if patch is None else patch,
            proj.bias,
            positions[0],
            torch.zeros_like(state.frame) if self.config.hold_position else state.frame,
            cls_token=self.cls_token.flatten() if self.config.with_cls_token else None,
            normalisation=normalisation,
            out_dtype=self.pos_embed.dtype if patch is None else self._state_dtype(),
            backend=named_or_auto("frame_embed", self.config.backend),
        )
        return self.pos_drop(tokens.unsqueeze(1))

    # ---- shared

    @property
    def spatial_blocks(self) -> list[SpatialBlock]:
        return [block for block in self.layers if isinstance(block, SpatialBlock)]

    @property
    def temporal_blocks(self) -> list[TemporalBlock]:
        return [block for block in self.layers if isinstance(block, TemporalBlock)]

    def _embed(self, video: Tensor, frame: Tensor) -> Tensor:
        """video (b, 3, t, h, w), frame numbers (t,) or (b, t) -> tokens (b, t, n, c): cls, patches, with positions.

        The temporal position is added to the patches, never to cls.
        """
        patches = self.patch_embed(video)
        p = self.config.patch_size
        positions = resize_positions(self.pos_embed, self.config.grid, (video.shape[3] // p, video.shape[4] // p))
        temporal = temporal_positions(frame, self.config.embed_dim).unsqueeze(-2)
        tokens = patches + positions[:, -patches.shape[2] :] + temporal
        if self.config.with_cls_token:
            cls = self.cls_token + positions[:, :1]
            tokens = torch.cat((cls.expand(*tokens.shape[:2], 1, -1).to(tokens.dtype), tokens), dim=2)
        return self.pos_drop(tokens.to(self.pos_embed.dtype))

    def _read(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embedded tokens (b, t, n, c) -> features and taps of that shape."""
        residual, taps = None, {}
        for i, block in enumerate(self.layers):
            hidden, residual = self._run(block, hidden, residual)
            if i in self.config.taps:
                taps[i] = hidden
        features, _ = self.norm_f(hidden, residual)
        return features, [taps[i] for i in self.config.taps]

    def _run(self, function: Any, *tensors: Tensor | None) -> Any:
        return run_block(self.gradient_checkpointing, function, *tensors)

    def _frame_numbers(self, frames: Tensor, state: StreamState) -> Tensor:
        """(b, t), or (t,) where the published test's habit of never advancing is wanted."""
        steps = torch.arange(frames.shape[2], device=frames.device)
        return steps if self.config.hold_position else state.frame.unsqueeze(1) + steps

    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if self.pos_embed.dtype == torch.float64 else torch.float32

    def _state_shapes(self, b: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        layers, d = config.temporal_layers, config.inner_dim
        return {"conv": (layers, b, config.d_conv - 1, d), "ssm": (layers, b, d, config.d_state), "frame": (b,)}

    def _check_video(self, video: Tensor, pictures: bool = False) -> None:
        check_video(type(self).__name__, video, self.config, self.pos_embed.device, pictures)

    def _check_state(self, frames: Tensor, state: StreamState) -> None:
        if not isinstance(state, StreamState):
            raise ValueError(f"EndoMamba: state must be a StreamState (see init_state), got {type(state).__name__}")
        shapes = self._state_shapes(frames.shape[0])
        try:
            state.check(self.config.fingerprint, shapes, self._state_dtype(), self.pos_embed.device)
        except ValueError as error:
            raise ValueError(f"EndoMamba: {error}") from None


@register_model
def endomamba(**options: Any) -> EndoMamba:
    """Any size: every field of EndoMambaConfig is an option."""
    return EndoMamba(EndoMambaConfig(**options))


@register_model
def endomamba_tiny(**options: Any) -> EndoMamba:
    """6.6 M parameters; no published weights."""
    return endomamba(**{"embed_dim": 192, "depth": 24, **options})


@register_model
def endomamba_small(**options: Any) -> EndoMamba:
    """24.5 M parameters; the one with published weights."""
    return endomamba(**{"embed_dim": 384, "depth": 24, **options})


@register_model
def endomamba_middle(**options: Any) -> EndoMamba:
    """71.3 M parameters; no published weights."""
    return endomamba(**{"embed_dim": 576, "depth": 32, **options})
