"""The attention twin: EndoMamba with attention for the scan, to say in numbers what the scan is worth.

Everything around the mixers is EndoMamba's own code: embedding, positions, cls token, residual in fp32, heads, the
split into spatial and temporal layers.  A block is attention and an MLP where EndoMamba has one mixer:

| | EndoMamba | the twin |
|---|---|---|
| spatial layer | scan of a frame's tokens, both ways | attention over a frame's tokens |
| temporal layer | scan of all tokens so far, frame by frame, forwards | causal attention over all tokens so far |
| carried | conv and ssm states, of fixed size | a KV cache that grows with the video |

What each token may read is therefore the same to the token: in a temporal layer a patch reads the tokens of its frame
that come before it, and all of the earlier frames (not only its own position in them, as divided attention would).

The MLP is as wide as gives a block the parameters of the EndoMamba block it stands for (`mlp_width`): within 0.5 % a
block and a model.  Where the mixer has decays the twin has matrices, so its matrix products take more multiply-adds a
token than the mixer's products and convs (the whole model: tiny 4.5 %, small 2.4 %, middle 1.6 %).  Not in these is
what the comparison is about: 2 * l * c multiply-adds a token for attention to l tokens, and about 6 * d * n operations,
one of them an exponential, a token and direction for the scan of d = 2 c channels with n = 16 states.

Letters: b streams, t frames, n tokens of a frame (cls first), c channels, h heads, e channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._registry import register_model
from .attention import Mlp, SelfAttention, windowed_attention
from .config import EndoMambaConfig, check_int
from .endomamba import EndoMamba
from .layers import DropPath, RMSNorm
from .state import CarriedState, Rows


@dataclass(frozen=True)
class AttentionTwinConfig(EndoMambaConfig):
    """The fields of the EndoMamba it is the twin of; d_state, d_conv, expand and dt_rank set the width of the MLPs."""

    num_heads: int | None = None  # None: heads of 64 channels
    max_frames: int | None = None  # how many frames a frame reads, itself included; None: all, the cache grows

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        for name in ("num_heads", "max_frames"):
            if getattr(self, name) is not None:
                check_int(who, name, getattr(self, name), 1)
        if self.embed_dim % self.heads:
            raise ValueError(f"{who}: num_heads must divide embed_dim={self.embed_dim}, got {self.heads}")
        for name in ("dt_init", "dt_min", "dt_max"):
            if getattr(self, name) != getattr(EndoMambaConfig, name):
                raise ValueError(f"{who}: {name} belongs to the scan, attention has none: leave it at its default")
        if self.dynamic_img_size:
            raise ValueError(f"{who}: dynamic_img_size is not for the twin: its cache holds frames of one size")
        if min(self.mlp_width(spatial) for spatial in (True, False)) < 8:
            raise ValueError(f"{who}: expand={self.expand} gives a mixer smaller than attention alone; use 2 or more")

    @property
    def heads(self) -> int:
        return max(1, self.embed_dim // 64) if self.num_heads is None else self.num_heads

    @property
    def frame_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns + self.with_cls_token

    def mlp_width(self, spatial: bool) -> int:
        """The multiple of 8 at which norm, attention and MLP have the parameters of EndoMamba's mixer."""
        c, d, n, r = self.embed_dim, self.inner_dim, self.d_state, self.rank
        direction = d * (self.d_conv + 1) + d * (r + 2 * n) + (r + 1) * d + d * n + d  # conv, x_proj, dt_proj, A, D
        mixer = 3 * c * d + direction * (2 if spatial else 1)
        attention = 4 * c * c + c  # qkv, proj, the second norm
        return round((mixer - attention) / (2 * c) / 8) * 8

    @property
    def fingerprint(self) -> str:
        height, width = self.size
        frames = "all frames" if self.max_frames is None else f"{self.max_frames} frames"
        return (
            f"attention twin {height}x{width} patch {self.patch_size} dim {self.embed_dim} heads {self.heads} "
            f"depth {self.spatial_layers}+{self.temporal_layers} {frames} cls {int(self.with_cls_token)}"
        )


@dataclass(eq=False)
class CacheState(CarriedState):
    """keys, values: (layers, b, h, capacity, e), of which tokens start .. stop are held, oldest first.

    frame: (b,) int64, frames seen so far, the same for every stream.  In the dtype of the weights.  `step_` fills the
    room up to `capacity` and doubles it when there is none, so `nbytes` is what the cache takes and `held_nbytes` what
    is in it.
    """

    TENSORS = ("keys", "values", "frame")

    keys: Tensor
    values: Tensor
    frame: Tensor
    model: str
    start: int = 0
    stop: int = 0

    @property
    def capacity(self) -> int:
        """Tokens for which there is room."""
        return self.keys.shape[3]

    @property
    def held_nbytes(self) -> int:
        """Bytes of the keys and values that the next frame reads."""
        held = self.keys[:, :, :, self.start : self.stop]
        return 2 * held.numel() * held.element_size()

    def held(self) -> tuple[Tensor, Tensor]:
        """keys and values (layers, b, h, tokens held, e): views."""
        window = slice(self.start, self.stop)
        return self.keys[:, :, :, window], self.values[:, :, :, window]

    def keep_(self, tokens: int) -> CacheState:
        """Forgets all but the newest `tokens`."""
        self.start = max(self.start, self.stop - tokens)
        return self

    def reserve_(self, tokens: int) -> CacheState:
        """Makes room for `tokens` more: at the front if what is held fits there, else in tensors twice as large."""
        held = self.stop - self.start
        if self.stop + tokens > self.capacity:
            room = held <= self.start and held + tokens <= self.capacity  # the copy must not overlap
            for name, kept in zip(("keys", "values"), self.held(), strict=True):
                old = getattr(self, name)
                with torch.inference_mode(False):  # as in init_state
                    new = old if room else old.new_empty((*old.shape[:3], 2 * (held + tokens), old.shape[4]))
                new[:, :, :, :held] = kept
                setattr(self, name, new)
            self.start, self.stop = 0, held
        return self

    def reset_(self, rows: Rows | None = None) -> CacheState:
        """Every stream starts anew; the room stays."""
        if rows is not None:
            raise NotImplementedError("CacheState.reset_: its streams are all at the same frame: reset all, rows=None")
        self.start = self.stop = 0
        self.frame.zero_()
        return self

    @torch.no_grad()
    def copy_(self, other: CarriedState) -> CacheState:
        """Takes over what `other` holds, in a copy; ValueError if it is not of this model, batch, device and dtype."""
        if not isinstance(other, CacheState):
            raise ValueError(f"state must be a CacheState, got {type(other).__name__}")
        shape = (*self.keys.shape[:3], other.capacity, self.keys.shape[4])
        shapes = {"keys": shape, "values": shape, "frame": self.frame.shape}
        other.check(self.model, shapes, self.keys.dtype, self.device)
        self.keys, self.values = other.keys.clone(), other.values.clone()
        self.start, self.stop = other.start, other.stop
        self.frame.copy_(other.frame)
        return self


class TemporalAttention(SelfAttention):
    """A token reads those before it, in its own frame and in at most max_frames - 1 earlier ones (None: in all)."""

    def __init__(self, channels: int, heads: int, max_frames: int | None):
        super().__init__(channels, heads, bias=False)
        self.max_frames = max_frames

    def forward(self, x: Tensor, n: int) -> Tensor:
        """x: (b, (t n), c) -> the same shape."""
        return self.merge(windowed_attention(*self.split(x), n, self.max_frames))

    def step(self, x: Tensor, n: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values: (b, h, held, e), of earlier frames -> what `forward` gives, keys and values with the new."""
        q, k, v = self.split(x)
        keys, values = torch.cat((keys, k.to(keys.dtype)), 2), torch.cat((values, v.to(values.dtype)), 2)
        return self.merge(windowed_attention(q, keys, values, n, self.max_frames)), keys, values

    def step_(self, x: Tensor, n: int, keys: Tensor, values: Tensor) -> Tensor:
        """`step` in place: keys and values end with room for the new tokens."""
        q, k, v = self.split(x)
        keys[:, :, -q.shape[2] :], values[:, :, -q.shape[2] :] = k, v
        return self.merge(windowed_attention(q, keys, values, n, self.max_frames))


class AttentionBlock(nn.Module):
    """Norm, attention, norm, MLP; each norm adds what came before it to the residual, as in EndoMamba's blocks."""

    joined: tuple[int, int]  # the two of (b, t, n) that are one dimension while tokens are mixed

    def __init__(self, attn: SelfAttention, channels: int, width: int, drop_path: float, backend: str):
        super().__init__()
        self.norm1 = RMSNorm(channels, backend)
        self.attn = attn
        self.norm2 = RMSNorm(channels, backend)
        self.mlp = Mlp(channels, width, bias=False)
        self.drop_path = DropPath(drop_path)

    def before(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden, residual: (b, t, n, c) -> what attention reads and the residual, both (s, l, c)."""
        rows = hidden.flatten(*self.joined)
        residual = None if residual is None else residual.flatten(*self.joined)
        return self.norm1(rows, residual, self.drop_path(rows))

    def after(self, attended: Tensor, residual: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """-> hidden, which the next norm adds to the residual, and residual, both of `shape`."""
        normed, residual = self.norm2(attended, residual, self.drop_path(attended))
        return self.mlp(normed).view(shape), residual.view(shape)


class SpatialAttentionBlock(AttentionBlock):
    """Each frame on its own."""

    joined = (0, 1)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, rows = self.before(hidden, residual)
        return self.after(self.attn(normed), rows, hidden.shape)


class TemporalAttentionBlock(AttentionBlock):
    """The whole clip as one sequence, frame by frame, read forwards; a cache carries it on."""

    joined = (1, 2)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, rows = self.before(hidden, residual)
        return self.after(self.attn(normed, hidden.shape[2]), rows, hidden.shape)

    def step(
        self, hidden: Tensor, residual: Tensor | None, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normed, rows = self.before(hidden, residual)
        attended, keys, values = self.attn.step(normed, hidden.shape[2], keys, values)
        return (*self.after(attended, rows, hidden.shape), keys, values)

    def step_(self, hidden: Tensor, residual: Tensor | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        normed, rows = self.before(hidden, residual)
        return self.after(self.attn.step_(normed, hidden.shape[2], keys, values), rows, hidden.shape)


class AttentionTwin(EndoMamba):
    """`model(video)`, `init_state`, `step` and `step_` as EndoMamba has them; the state is a `CacheState`.

    Work and memory of a streamed frame grow with the frames seen, up to `max_frames`.
    """

    config: AttentionTwinConfig

    def _block(self, i: int) -> nn.Module:
        config = self.config
        spatial = i < config.spatial_layers
        drop_path = config.drop_path_of(i)
        sizes = (config.embed_dim, config.mlp_width(spatial), drop_path, config.backend)
        if spatial:
            return SpatialAttentionBlock(SelfAttention(config.embed_dim, config.heads, bias=False), *sizes)
        return TemporalAttentionBlock(TemporalAttention(config.embed_dim, config.heads, config.max_frames), *sizes)

    def init_state(
        self, batch_size: int = 1, device: torch.device | str | None = None, reserve_frames: int = 0
    ) -> CacheState:
        """The state of `batch_size` streams before their first frame, with room for `reserve_frames` from the start."""
        if batch_size < 1:
            raise ValueError(f"AttentionTwin.init_state: batch_size must be at least 1, got {batch_size}")
        device = self.pos_embed.device if device is None else torch.device(device)
        shapes = self._state_shapes(batch_size, reserve_frames * self.config.frame_tokens)
        with torch.inference_mode(False):  # or `step_` could not change it outside of the caller's inference mode
            return CacheState(
                keys=torch.empty(shapes["keys"], dtype=self._state_dtype(), device=device),
                values=torch.empty(shapes["values"], dtype=self._state_dtype(), device=device),
                frame=torch.zeros(shapes["frame"], dtype=torch.int64, device=device),
                model=self.config.fingerprint,
            )

    def step_features(self, frames: Tensor, state: CacheState) -> tuple[Tensor, CacheState]:
        """As EndoMamba's: functional, so it copies the cache; `step_` is the one that does not."""
        self._check_video(frames)
        self._check_state(frames, state)
        hidden, residual = self._embed(frames, self._frame_numbers(frames, state)), None
        for spatial in self.spatial_blocks:
            hidden, residual = self._run(spatial, hidden, residual)
        (past_keys, past_values), keys, values = state.held(), [], []
        for i, temporal in enumerate(self.temporal_blocks):
            hidden, residual, k, v = self._run(temporal.step, hidden, residual, past_keys[i], past_values[i])
            keys.append(k)
            values.append(v)
        features, _ = self.norm_f(hidden, residual)
        after = CacheState(
            keys=torch.stack(keys) if keys else state.keys,
            values=torch.stack(values) if values else state.values,
            frame=state.frame + frames.shape[2],
            model=state.model,
            stop=keys[0].shape[2] if keys else 0,
        )
        return features, after.keep_(self._memory)

    def step_(self, frames: Tensor, state: CacheState, normalisation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`step` for inference: returns what `forward` returns and appends to `state`; arguments as EndoMamba's.

        No host synchronisation.  Tensor shapes and addresses change from frame to frame, so a CUDA graph holds one
        length of the cache only, and `state.reserve_` before it.  RuntimeError where gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "AttentionTwin.step_ overwrites its state and has no gradient: call it under torch.inference_mode() "
                "or torch.no_grad(), or use step, which returns the state"
            )
        hidden, residual = self._embed_next(frames, state, normalisation), None
        for spatial in self.spatial_blocks:
            hidden, residual = spatial(hidden, residual)
        new = hidden.shape[1] * self.config.frame_tokens
        state.reserve_(new).stop += new
        keys, values = state.held()
        for i, temporal in enumerate(self.temporal_blocks):
            hidden, residual = temporal.step_(hidden, residual, keys[i], values[i])
        state.keep_(self._memory)
        state.frame.add_(hidden.shape[1])
        features, _ = self.norm_f(hidden, residual)
        return self.head(features)

    @property
    def spatial_blocks(self) -> list[SpatialAttentionBlock]:
        return [block for block in self.layers if isinstance(block, SpatialAttentionBlock)]

    @property
    def temporal_blocks(self) -> list[TemporalAttentionBlock]:
        return [block for block in self.layers if isinstance(block, TemporalAttentionBlock)]

    @property
    def _memory(self) -> int:
        """Tokens that the next frame may read."""
        frames = self.config.max_frames
        return 2**62 if frames is None else (frames - 1) * self.config.frame_tokens

    def _state_dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    def _state_shapes(self, b: int, capacity: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        cache = (config.temporal_layers, b, config.heads, capacity, config.embed_dim // config.heads)
        return {"keys": cache, "values": cache, "frame": (b,)}

    def _check_state(self, frames: Tensor, state: CacheState) -> None:
        if not isinstance(state, CacheState):
            raise ValueError(f"AttentionTwin: state must be a CacheState (see init_state), got {type(state).__name__}")
        shapes = self._state_shapes(frames.shape[0], state.capacity)
        try:
            state.check(self.config.fingerprint, shapes, self._state_dtype(), self.pos_embed.device)
        except ValueError as error:
            raise ValueError(f"AttentionTwin: {error}") from None


@register_model
def attention_twin(**options: Any) -> AttentionTwin:
    """The twin of `endomamba(**options)`; num_heads and max_frames are its own options."""
    return AttentionTwin(AttentionTwinConfig(**options))


@register_model
def attention_twin_tiny(**options: Any) -> AttentionTwin:
    """The twin of endomamba_tiny, 6.6 M parameters, 3 heads."""
    return attention_twin(**{"embed_dim": 192, "depth": 24, **options})


@register_model
def attention_twin_small(**options: Any) -> AttentionTwin:
    """The twin of endomamba_small, 24.5 M parameters, 6 heads."""
    return attention_twin(**{"embed_dim": 384, "depth": 24, **options})


@register_model
def attention_twin_middle(**options: Any) -> AttentionTwin:
    """The twin of endomamba_middle, 71.3 M parameters, 9 heads."""
    return attention_twin(**{"embed_dim": 576, "depth": 32, **options})
