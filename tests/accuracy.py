"""The one accuracy rule for outputs, states and gradients."""

import torch
from torch import Tensor


def assert_as_accurate_as_eager(name: str, got: Tensor, eager: Tensor, truth: Tensor, slack: float = 2.0) -> None:
    """got may err at most `slack` times as much as eager, plus one rounding of each element.

    truth: the reference in fp64.  eager: the reference with fp32 state, cast to got's dtype.  Same rounded inputs for
    all three.
    Four fp32 roundings of the largest element stand beside that: eager's error is the largest of one sample, which for
    a handful of elements, or for one term and no sum, can be zero by luck.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, not {eager.dtype}"
    if not got.numel():
        return
    got, eps = got.double(), torch.finfo(got.dtype).eps
    luck = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    bound = slack * (eager.double() - truth).abs().max() + eps * truth.abs() + luck
    error = (got - truth).abs()
    worst = (error - bound).argmax()
    found = f"{name}: off by {error.flatten()[worst]:.2e} at {worst}, allowed is {bound.flatten()[worst]:.2e}"
    assert (error <= bound).all(), found  # NaN fails too
