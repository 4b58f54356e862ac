"""What ends a training with one sentence; bad data is a DataError, a full disk a SaveError."""

from __future__ import annotations


class TrainError(RuntimeError):
    """Training cannot go on.  The message is one sentence; what was saved is complete."""


class NonFiniteLoss(TrainError):
    """Names the step, the clips and the first layer that was not finite."""
