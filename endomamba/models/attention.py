"""Multi-head self-attention and the MLP after it, for the models that EndoMamba is compared with.

Letters: s sequences, h heads, l tokens, c channels, e channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right


class SelfAttention(nn.Module):
    """proj(softmax(q k^T / sqrt(e)) v), every token reading every token of its sequence."""

    def __init__(self, channels: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)  # rows [q | k | v], each heads x e
        self.proj = nn.Linear(channels, channels, bias=bias)

    def project(self, x: Tensor) -> Tensor:
        """(s, l, c) -> (s, l, [q | k | v])."""
        return self.qkv(x)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(s, l, c) -> q, k, v, each (s, h, l, e), views of one product."""
        q, k, v = torch.unflatten(self.project(x), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        """(s, h, l, e) -> (s, l, c)."""
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """(s, l, c) -> (s, l, c)."""
        return self.merge(F.scaled_dot_product_attention(*self.split(x)))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), the exact (erf) GELU."""

    def __init__(self, channels: int, hidden: int, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., c)."""
        return self.fc2(F.gelu(self.fc1(x)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: (s, h, new, e), the newest tokens; k, v: (s, h, held, e), all of them, q's own last -> (s, h, new, e).

    A token reads itself and what is before it.  No mask is made on a GPU, where the fused kernels count from the end.
    """
    new, held = q.shape[2], k.shape[2]
    if new == held:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.is_cuda:  # this mask calls the kernels past autocast: an fp32 cache is cast here
        mask = causal_lower_right(new, held)
        return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
    mask = torch.ones(new, held, dtype=torch.bool, device=q.device).tril(held - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, frame_tokens: int, max_frames: int | None) -> Tensor:
    """`causal_attention` in which a token reads its own frame and at most max_frames - 1 before it (None: all)."""
    new, held, n = q.shape[2], k.shape[2], frame_tokens
    if max_frames is None or held <= max_frames * n:
        return causal_attention(q, k, v)
    outputs = []
    for frame, stop in zip(q.split(n, dim=2), range(held - new + n, held + 1, n), strict=True):
        window = slice(max(0, stop - max_frames * n), stop)
        outputs.append(causal_attention(frame, k[:, :, window], v[:, :, window]))
    return torch.cat(outputs, 2)
