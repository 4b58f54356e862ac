"""Our models with the kernels that EndoMamba was published with: mamba-ssm's CUDA scan and causal-conv1d.

Both ways is two calls and flips, as in EndoMamba, Vim and VideoMamba.  A frame with a carried state needs the scan of
the EndoMamba repository, which takes a state; upstream's does not (https://github.com/TianCuteQY/EndoMamba,
https://github.com/state-spaces/mamba, https://github.com/Dao-AILab/causal-conv1d).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from endomamba.models.mixer import BidirectionalMixer, CausalMixer


def missing(state: bool = False) -> str:
    """Why they cannot run here, or an empty text.  state: the scan must take one."""
    if not torch.cuda.is_available():
        return "mamba-ssm's kernels need a GPU"
    try:
        import causal_conv1d  # noqa: F401
        import selective_scan_cuda
    except ImportError as error:
        return f"mamba-ssm and causal-conv1d are not installed ({error})"
    if state and not takes_state(selective_scan_cuda.fwd):
        return "the installed selective_scan_cuda takes no state; that of the EndoMamba repository does"
    return ""


@functools.cache
def takes_state(fwd: Callable) -> bool:
    """Whether the extension's function, whose arguments have no names, has a tenth one."""
    return "arg9" in (fwd.__doc__ or "")


def with_published_kernels(model: nn.Module) -> nn.Module:
    """The model, its mixers computed as published; norms, projections and weights stay."""
    for module in model.modules():
        if isinstance(module, BidirectionalMixer):
            module.forward = functools.partial(both_ways, module)
        elif isinstance(module, CausalMixer):
            module.forward = functools.partial(one_way, module)
            module.step_ = functools.partial(one_way_, module)
    return model


def both_ways(mixer: BidirectionalMixer, u: Tensor) -> Tensor:
    xz = projected(mixer, u)
    y = inner(xz, *mixer.parameters_forward())
    y = y + inner(xz.flip(-1), *mixer.parameters_backward()).flip(-1)
    return F.linear(y.mT, mixer.out_proj.weight, mixer.out_proj.bias)


def one_way(mixer: CausalMixer, u: Tensor) -> Tensor:
    y = inner(projected(mixer, u), *mixer.parameters_forward())
    return F.linear(y.mT, mixer.out_proj.weight, mixer.out_proj.bias)


def one_way_(mixer: CausalMixer, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    y = inner(projected(mixer, u), *mixer.parameters_forward(), conv_state, ssm_state)
    return F.linear(y.mT, mixer.out_proj.weight, mixer.out_proj.bias)


def projected(mixer: nn.Module, u: Tensor) -> Tensor:
    """(b, l, c) -> (b, 2d, l): the weight times the tokens, so that time is innermost."""
    b, l, c = u.shape
    weight = mixer.in_proj.weight
    if torch.is_autocast_enabled("cuda"):
        weight, u = (t.to(torch.get_autocast_dtype("cuda")) for t in (weight, u))
    return (weight @ u.reshape(b * l, c).T).view(-1, b, l).transpose(0, 1)


def inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(b, 2d, l) -> (b, d, l).  States (b, w - 1, d) and (b, d, n), overwritten."""
    from causal_conv1d import causal_conv1d_fn

    (b, _, l), n, r, dtype = xz.shape, A.shape[1], dt_proj.shape[1], xz.dtype
    x, z = xz.chunk(2, 1)
    weight, bias = conv_weight.to(dtype), conv_bias.to(dtype)
    if conv_state is None:
        x = causal_conv1d_fn(x, weight, bias, activation="silu")
    else:
        before = conv_state.shape[1]
        x = torch.cat((conv_state.mT.to(dtype), x), -1)
        conv_state.copy_(x[..., -before:].mT)
        x = causal_conv1d_fn(x, weight, bias, activation="silu")[..., before:].contiguous()
    low = F.linear(x.mT.reshape(b * l, -1), x_proj.to(dtype))
    dt = (dt_proj.to(dtype) @ low[:, :r].T).view(-1, b, l).transpose(0, 1)
    B, C = (low[:, r + i * n : r + (i + 1) * n].view(b, l, n).mT.unsqueeze(1).contiguous() for i in (0, 1))
    return scan(x, dt, A, B, C, D, z, dt_bias.float(), ssm_state)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, state: Tensor | None
) -> Tensor:
    import selective_scan_cuda

    args = x, dt, A, B, C, D.float(), z, dt_bias
    if torch.is_grad_enabled():
        return Scan.apply(*args)
    _, carried, y = selective_scan_cuda.fwd(*args, True, *carried_from(x, A, state))
    if state is not None:
        state.copy_(carried[:, :, -1, 1::2])
    return y


def carried_from(x: Tensor, A: Tensor, state: Tensor | None) -> tuple[Tensor, ...]:
    """What holds the state for the published scan, (product of decays, state) in turn; nothing for upstream's."""
    import selective_scan_cuda

    if not takes_state(selective_scan_cuda.fwd):
        return ()
    carried = torch.zeros(x.shape[0], A.shape[0], -(-x.shape[-1] // 2048), 2 * A.shape[1], device=x.device)
    carried[:, :, 0, 0::2] = 1
    if state is not None:
        carried[:, :, 0, 1::2].copy_(state)
    return (carried,)


class Scan(torch.autograd.Function):
    """The kernel's own backward, with upstream's arguments."""

    @staticmethod
    def forward(ctx, *args: Tensor) -> Tensor:
        import selective_scan_cuda

        out, carried, y = selective_scan_cuda.fwd(*args, True, *carried_from(args[0], args[2], None))
        ctx.save_for_backward(*args, out, carried)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        import selective_scan_cuda

        *args, out, carried = ctx.saved_tensors
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        dx, ddt, dA, dB, dC, dD, dbias, dz = selective_scan_cuda.bwd(
            *args, dy, carried, out, torch.empty_like(args[6]), True, False
        )
        return dx, ddt, dA, dB, dC, dD, dz, dbias
