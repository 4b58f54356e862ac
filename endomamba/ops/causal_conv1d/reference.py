"""The convolution in plain PyTorch: the kernels' truth, in fp64, and the last resort without them.

Backward is written by hand, as a custom op runs below autograd: README.md has the equations.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, silu


def unsupported(x: Tensor, *others: Tensor | None) -> list[str]:
    return []


def causal_conv1d_fwd(x, weight, bias, initial_state, cu_seqlens, apply_silu, reverse, frames, return_final_state):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = []
    for index, row, tokens in _sequences(x, cu_seqlens, frames, reverse):
        window = _window(x[row, tokens], weight, None if initial_state is None else initial_state[index])
        pre = _taps(window, weight, bias, tokens.numel())
        y[row, tokens] = (silu(pre) if apply_silu else pre).to(x.dtype)
        states.append(window[tokens.numel() :])
    if not return_final_state:
        return y, weight.new_empty(0)
    return y, torch.stack(states) if states else weight.new_empty(0, weight.shape[1] - 1, x.shape[2])


def causal_conv1d_bwd(
    dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, apply_silu, reverse, frames, dx=None
):
    width = weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = weight.new_zeros(0 if bias is None else bias.shape)
    dstate = weight.new_zeros(0 if initial_state is None else initial_state.shape)
    for index, row, tokens in _sequences(x, cu_seqlens, frames, reverse):
        length = tokens.numel()
        window = _window(x[row, tokens], weight, None if initial_state is None else initial_state[index])
        dwindow = torch.zeros_like(window)
        if dy is not None:
            g = dy[row, tokens].to(weight.dtype)
            if apply_silu:
                g = g * _silu_slope(_taps(window, weight, bias, length))
            for j in range(width):
                dwindow[j : j + length] += weight[:, j] * g
                dweight[:, j] += (window[j : j + length] * g).sum(0)
            if bias is not None:
                dbias += g.sum(0)
        if dfinal_state is not None:
            dwindow[length:] += dfinal_state[index]
        dx[row, tokens] = dwindow[width - 1 :].to(x.dtype)
        if initial_state is not None:
            dstate[index] = dwindow[: width - 1]
    return dx, dweight, dbias, dstate


def bidirectional_conv1d_fwd(x, weight, bias, weight_b, bias_b, cu_seqlens, apply_silu, frames):
    y, _ = causal_conv1d_fwd(x, weight, bias, None, cu_seqlens, apply_silu, False, frames, False)
    y_b, _ = causal_conv1d_fwd(x, weight_b, bias_b, None, cu_seqlens, apply_silu, True, frames, False)
    return y, y_b


def bidirectional_conv1d_bwd(dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, apply_silu, frames, dx=None):
    # The sum of the two directions is rounded once: their parts of dx come in the accumulator's dtype.
    wide = x.to(weight.dtype)
    forward = causal_conv1d_bwd(dy, None, wide, weight, bias, None, cu_seqlens, apply_silu, False, frames)
    backward = causal_conv1d_bwd(dy_b, None, wide, weight_b, bias_b, None, cu_seqlens, apply_silu, True, frames)
    dx_f, dweight, dbias, _ = forward
    dx_b, dweight_b, dbias_b, _ = backward
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    return dx.copy_(dx_f + dx_b), dweight, dbias, dweight_b, dbias_b


def _sequences(x: Tensor, cu_seqlens: Tensor | None, frames: int, reverse: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Sequence by sequence its number, its row of x and its tokens in walking order."""
    if cu_seqlens is None:
        walk = torch.arange(x.shape[1], device=x.device)
        if frames:  # step k visits token (k % frames) * (l / frames) + k // frames
            walk = walk.view(frames, x.shape[1] // frames).t().reshape(-1)
        walk = walk.flip(0) if reverse else walk
        yield from ((row, row, walk) for row in range(x.shape[0]))
        return
    ends = cu_seqlens.tolist()
    for index, (start, end) in enumerate(pairwise(ends)):
        walk = torch.arange(start, end, device=x.device)
        yield index, 0, walk.flip(0) if reverse else walk


def _window(walked: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The w - 1 tokens of the state, then the sequence as it is walked: (w - 1 + l, d)."""
    walked = walked.to(weight.dtype)
    if initial_state is None:
        return pad(walked, (0, 0, weight.shape[1] - 1, 0))
    return torch.cat([initial_state, walked])


def _taps(window: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    pre = torch.zeros_like(window[:length]) if bias is None else bias.expand(length, -1)
    for j in range(weight.shape[1]):
        pre = pre + weight[:, j] * window[j : j + length]
    return pre


def _silu_slope(pre: Tensor) -> Tensor:
    s = torch.sigmoid(pre)
    return s * (1 + pre * (1 - s))
