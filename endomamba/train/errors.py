"""What ends a training with one sentence; a full disk is a SaveError (checkpoint.py)."""

from __future__ import annotations

from collections.abc import Iterator


class DataError(ValueError):
    """The data cannot be used.  The message is one sentence that names the file, and the line where there is one."""


class TrainError(RuntimeError):
    """Training cannot go on.  The message is one sentence; what was saved is complete."""


class NonFiniteLoss(TrainError):
    """Names the step, the clips and the first layer that was not finite."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it hides: torch.save answers whatever happens while it writes with an error of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
