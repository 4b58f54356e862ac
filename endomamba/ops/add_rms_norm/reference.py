"""The fused add and norm in plain PyTorch: the kernels' truth, in fp64, and the last resort without them.

Backward is written by hand, as a custom op runs below autograd: README.md has the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(x: Tensor, *others: Tensor | None) -> list[str]:
    return []


def add_norm_fwd(x, weight, bias, residual, row_scale, eps, layer_norm):
    r = x.to(weight.dtype, copy=True)  # outputs never alias inputs
    if row_scale is not None:
        r = _per_row(row_scale, x) * r
    if residual is not None:
        r = residual + r
    r = r.contiguous()
    mean = r.mean(-1, keepdim=True) if layer_norm else None
    centred = r - mean if layer_norm else r
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * rstd * weight
    if bias is not None:
        normed = normed + bias
    stats = [mean, rstd] if layer_norm else [rstd]
    normed = normed.to(x.dtype, copy=True).contiguous()
    return normed, r, torch.stack([s.reshape(-1) for s in stats])


def add_norm_bwd(
    dnormed, dnew_residual, x, new_residual, stats, weight, bias, row_scale, dtype, has_residual, layer_norm
):
    wide = weight.dtype
    dr = torch.zeros_like(new_residual) if dnew_residual is None else dnew_residual.to(wide, copy=True).contiguous()
    dweight = torch.zeros_like(weight)
    dbias = weight.new_zeros(0 if bias is None else bias.shape)
    if dnormed is not None:
        rstd = stats[-1].view(*new_residual.shape[:-1], 1)
        centred = new_residual - stats[0].view_as(rstd) if layer_norm else new_residual
        rhat = centred * rstd
        g = dnormed.to(wide)
        wg = weight * g
        through_mean = wg.mean(-1, keepdim=True) if layer_norm else 0
        dr += rstd * (wg - through_mean - rhat * (wg * rhat).mean(-1, keepdim=True))
        leading = tuple(range(g.ndim - 1))
        dweight = (g * rhat).sum(leading)
        if bias is not None:
            dbias = g.sum(leading)
    dx = dr if row_scale is None else dr * _per_row(row_scale, dr)
    drow_scale = weight.new_zeros(0)
    if x is not None:
        drow_scale = (dr * x).to(wide).flatten(1).sum(1)
    dresidual = dr if has_residual else dr.new_empty(0)
    return dx.to(dtype, copy=True), dweight, dbias, dresidual, drow_scale


def _per_row(row_scale: Tensor, x: Tensor) -> Tensor:
    return row_scale.view(-1, *(1,) * (x.ndim - 1))
