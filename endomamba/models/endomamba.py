"""EndoMamba (arXiv 2502.19090): spatial blocks scan each frame both ways, temporal blocks scan the stream causally.

Letters: b streams, t frames, n tokens of a frame (the class token first), c channels, d inner channels, w conv width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from endomamba.ops import add_rms_norm

from .config import EndoMambaConfig
from .heads import make_head, pool_tokens
from .layers import PatchEmbed, RMSNorm, drop_path_scale, temporal_position
from .mixer import Mixer, init_out_proj
from .registry import register_model
from .state import StreamState


class Block(nn.Module):
    """r <- r + DropPath(h);  h <- mixer(norm(r)).  The residual r is fp32."""

    def __init__(self, config: EndoMambaConfig, bidirectional: bool, drop_path: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mixer = Mixer(config, bidirectional)
        self.drop_path = drop_path
        self.backend, self.plan = config.backend, config.plan

    def add_norm(self, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> norm of the new residual in h's dtype, the new residual; h, r (rows, l, c)."""
        scale = drop_path_scale(h, self.drop_path) if self.training and self.drop_path and r is not None else None
        return add_rms_norm(
            h, self.norm.weight, r, row_scale=scale, eps=self.norm.eps, plan=self.plan, backend=self.backend
        )

    def forward(self, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        y, r = self.add_norm(h, r)
        return self.mixer(y), r

    def step(self, h: Tensor, r: Tensor | None, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next tokens of a stream: h, r, and the layer's new states."""
        y, r = self.add_norm(h, r)
        h, conv, ssm = self.mixer.step(y, conv, ssm)
        return h, r, conv, ssm

    def step_(self, h: Tensor, r: Tensor | None, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
        """`step` with the layer's states overwritten."""
        y, r = self.add_norm(h, r)
        return self.mixer.step_(y, conv, ssm), r


class EndoMamba(nn.Module):
    """model(video) for clips, model.step(frames, state) for streams; the same numbers either way."""

    default_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "num_frames": 16}

    def __init__(self, config: EndoMambaConfig) -> None:
        super().__init__()
        self.config = config
        c = config.embed_dim
        self.patch_embed = PatchEmbed(config.in_chans, c, config.patch_size)
        if config.with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, c))
        self.pos_drop = nn.Dropout(config.drop_rate)
        # Published: block i drops what block i - 1 made, at rate * (i - 1) / (depth - 1); the last value is never used.
        rates = [0.0, *(config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth - 1))]
        self.layers = nn.ModuleList(
            Block(config, i < config.num_spatial_layers, rate) for i, rate in enumerate(rates[: config.depth])
        )
        self.norm_f = RMSNorm(c, config.norm_eps)
        self.head_drop = nn.Dropout(config.head_drop_rate)
        self.head = make_head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published init in its order: it re-draws dt_proj and zeroes its bias, unless dt_init is "mamba"."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.layers:
            init_out_proj(block.mixer.out_proj, self.config.depth)
            if self.config.dt_init == "mamba":
                block.mixer.reset_dt(self.config)

    # --- clips -----------------------------------------------------------------------------------------------------

    def forward(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w), normalised RGB -> (b, t, classes); head "classification": (b, classes), one for the clip.

        Without classes: the pooled features in place of the logits.
        """
        logits = self.forward_head(self.forward_features(video))
        return logits.mean(dim=1) if self.config.head == "classification" else logits

    def forward_features(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> (b, t, n, c) after the last norm; token 0 of each frame is the class token."""
        return self._encode(video, taps=False)[0]

    def forward_intermediates(self, video: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features and, of three blocks (`config.taps`), the mixer's own output (b, t, n, c), before it is added."""
        return self._encode(video, taps=True)

    def forward_head(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, t, classes)."""
        return self.head(self.head_drop(pool_tokens(features, self.config.pool)))

    def _encode(self, video: Tensor, taps: bool) -> tuple[Tensor, list[Tensor]]:
        self._check_video(video)
        b, t = video.shape[0], video.shape[2]
        frame = torch.zeros(b, dtype=torch.int64, device=video.device)
        h, r, tapped = self.embed(video, frame), None, []
        for i, block in enumerate(self.layers):
            h, r = self._layout(h, r, b, t, i)
            if self.config.use_checkpoint and torch.is_grad_enabled():
                h, r = checkpoint(block, h, r, use_reentrant=False)
            else:
                h, r = block(h, r)
            if taps and i in self.config.taps:
                tapped.append(h.view(b, t, self.config.tokens, -1))
        return self._final(h, r, b, t), tapped

    def embed(self, video: Tensor, frame: Tensor) -> Tensor:
        """Patches, class token and positions -> (b, t, n, c); frame (b,): index of each stream's first frame."""
        b, t = video.shape[0], video.shape[2]
        patches = self.patch_embed(video)
        index = frame[:, None] + torch.arange(t, device=frame.device)
        time = temporal_position(index, self.config.embed_dim).unsqueeze(2)  # (b, t, 1, c), for patches only
        if not self.config.with_cls_token:
            return self.pos_drop(patches + self.pos_embed + time.to(patches.dtype))
        patches = patches + self.pos_embed[:, 1:] + time.to(patches.dtype)
        cls = (self.cls_token + self.pos_embed[:, :1]).to(patches.dtype).expand(b, t, 1, -1)
        return self.pos_drop(torch.cat((cls, patches), dim=2))

    def _layout(self, h: Tensor, r: Tensor | None, b: int, t: int, layer: int) -> tuple[Tensor, Tensor | None]:
        """(b t) n c for a spatial block, b (t n) c for a temporal one: the same memory."""
        rows = (b * t, self.config.tokens) if layer < self.config.num_spatial_layers else (b, t * self.config.tokens)
        return h.view(*rows, -1), r if r is None else r.view(*rows, -1)

    def _final(self, h: Tensor, r: Tensor, b: int, t: int) -> Tensor:
        y, _ = add_rms_norm(
            h, self.norm_f.weight, r, eps=self.norm_f.eps, plan=self.config.plan, backend=self.config.backend
        )
        return y.view(b, t, self.config.tokens, -1)

    # --- streams ---------------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int = 1, device: torch.device | str | None = None) -> StreamState:
        """The state before the first frame of `batch_size` streams."""
        weight = self.patch_embed.proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return StreamState.zeros(self.config, batch_size, torch.device(device or weight.device), dtype)

    def step(self, frames: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """The next t >= 1 frames of each stream: (b, 3, t, h, w) -> per-frame logits (b, t, classes) and the new state.

        Functional (the given state stays as it was) and differentiable, through the state too.  Equal to `forward` on the
        whole stream within rounding, wherever it is cut.
        """
        features, state = self.step_features(frames, state)
        return self.forward_head(features), state

    def step_features(self, frames: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """`step` up to the features (b, t, n, c)."""
        self._check_stream(frames, state)
        b, t = frames.shape[0], frames.shape[2]
        h, r, convs, ssms = self.embed(frames, self._position(state)), None, [], []
        for i, block in enumerate(self.layers):
            h, r = self._layout(h, r, b, t, i)
            k = i - self.config.num_spatial_layers
            if k < 0:
                h, r = block(h, r)
            else:
                h, r, conv, ssm = block.step(h, r, state.conv[k], state.ssm[k])
                convs.append(conv)
                ssms.append(ssm)
        conv, ssm = (torch.stack(convs), torch.stack(ssms)) if convs else (state.conv.clone(), state.ssm.clone())
        new = dataclasses.replace(state, conv=conv, ssm=ssm, frame=state.frame + t)
        return self._final(h, r, b, t), new

    def step_(self, frames: Tensor, state: StreamState) -> Tensor:
        """`step` that overwrites the given state and returns the logits alone; for inference (see ops.frame_step)."""
        return self.forward_head(self.step_features_(frames, state))

    def step_features_(self, frames: Tensor, state: StreamState) -> Tensor:
        """`step_` up to the features (b, t, n, c)."""
        if torch.is_grad_enabled():
            raise RuntimeError("step_ overwrites the state and has no gradient: use torch.inference_mode(), or step")
        self._check_stream(frames, state)
        b, t = frames.shape[0], frames.shape[2]
        h, r = self.embed(frames, self._position(state)), None
        for i, block in enumerate(self.layers):
            h, r = self._layout(h, r, b, t, i)
            k = i - self.config.num_spatial_layers
            h, r = block(h, r) if k < 0 else block.step_(h, r, state.conv[k], state.ssm[k])
        state.frame.add_(t)
        return self._final(h, r, b, t)

    def _position(self, state: StreamState) -> Tensor:
        return torch.zeros_like(state.frame) if self.config.hold_position else state.frame

    def _check_stream(self, frames: Tensor, state: StreamState) -> None:
        self._check_video(frames)
        if not isinstance(state, StreamState):
            raise TypeError(f"step: state must be a StreamState from model.init_state, got {type(state).__name__}")
        state.check(self.config.fingerprint(), frames.shape[0], frames.device)

    def _check_video(self, video: Tensor) -> None:
        c, (h, w) = self.config.in_chans, self.config.img_size
        if video.ndim != 5 or video.shape[1] != c or tuple(video.shape[3:]) != (h, w) or video.shape[2] < 1:
            raise ValueError(
                f"EndoMamba: video must be (b, {c}, t >= 1, {h}, {w}), got {tuple(video.shape)}; for another size build the "
                f"model with img_size=(h, w), load_checkpoint then interpolates its positions"
            )
        if not video.is_floating_point():
            raise ValueError(f"EndoMamba: video must be normalised and floating point, got {video.dtype}")
        weight = self.patch_embed.proj.weight
        if video.device != weight.device:
            raise ValueError(f"EndoMamba: the model is on {weight.device}, the video on {video.device}")


@register_model
def endomamba_tiny(**options) -> EndoMamba:
    """192 channels, 12 + 12 blocks, 6.6 M parameters."""
    return EndoMamba(EndoMambaConfig(**{"embed_dim": 192, "depth": 24, **options}))


@register_model
def endomamba_small(**options) -> EndoMamba:
    """384 channels, 12 + 12 blocks, 24.5 M parameters; the published weights are of this size."""
    return EndoMamba(EndoMambaConfig(**{"embed_dim": 384, "depth": 24, **options}))


@register_model
def endomamba_middle(**options) -> EndoMamba:
    """576 channels, 16 + 16 blocks, 71.3 M parameters."""
    return EndoMamba(EndoMambaConfig(**{"embed_dim": 576, "depth": 32, **options}))


@register_model
def endomamba(**options) -> EndoMamba:
    """Any size: every field of EndoMambaConfig is an option."""
    return EndoMamba(EndoMambaConfig(**options))
