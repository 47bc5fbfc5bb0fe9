"""What can go wrong, in words."""

from __future__ import annotations

import traceback
from typing import Any


class OptimizeNestedError(RuntimeError):
    """Base of the errors this package raises."""


class CaptureError(OptimizeNestedError):
    """A loss could not be captured as one graph.

    Attributes:
        reason: What stood in the way.
        where: ``file:line: code`` of the user's code, or ``?``.
        other: Why the way that was tried next did not capture it either; nothing if none was.
    """

    def __init__(self, reason: str, where: str = "?") -> None:
        super().__init__(f"{reason} (at {where})" if where != "?" else reason)
        self.reason, self.where, self.other = reason, where, ""

    @property
    def said(self) -> str:
        """What it was raised with; PyTorch adds to an error's text on its way."""
        said = f"{self.reason} (at {self.where})" if self.where != "?" else self.reason
        return f"{said}; {self.other}" if self.other else said


class NeedsNumber(CaptureError):
    """A float argument that changes is used where only a Python number will do; capture anew for
    each value."""


class NeedsInteger(CaptureError):
    """An integer that is read from a tensor decides on sizes, or on host code; capture anew with
    the value that it has in this call."""


class NotDifferentiable(CaptureError):
    """PyTorch cannot differentiate the loss as written; by pullbacks in place of forward mode it
    may."""


class NeedsPullbacks(CaptureError):
    """Dynamo cannot trace this forward mode; capture anew with pullbacks in its place."""


class TooLittleWork(CaptureError):
    """Calls of this size are quicker as written."""


class InternalError(CaptureError):
    """Something of ours failed while it rewrote or compiled a loss: our bug. The loss runs as
    written.

    Attributes:
        error: What failed.
        captured: What Dynamo captured, until it is written to a folder.
    """

    def __init__(self, error: BaseException, captured: Any) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"
        super().__init__(f"internal error in optimize_nested: {error!r}", where)
        self.error, self.captured = error, captured


class KeepsChanging(CaptureError):
    """A value that a specialisation holds for was another one too often; calls that no
    specialisation holds for run as written."""


class OptionError(OptimizeNestedError, ValueError):
    """An option asks for something that this loss does not have."""


class RuleError(OptimizeNestedError, ValueError):
    """A rule that is not its operator's, or that cannot be compared with it."""


class NotRewritten(OptimizeNestedError):
    """`strict=True`, and a derivative would be left as written."""


class CheckFailed(OptimizeNestedError):
    """`check=True`, and the rewritten loss differs from the loss as written."""


class ArtifactError(OptimizeNestedError):
    """A file that `load` refuses: damaged, not an artifact, or made for something else than what is
    here."""


class NestedGradientWarning(UserWarning):
    """A decorated loss runs as written, or an inner derivative is a constant to the outer one."""


def for_its_words(error: BaseException) -> BaseException:
    """Take from an error that is kept what it leads to beside its words: frames and errors before
    it, with the user's modules and tensors in them."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
