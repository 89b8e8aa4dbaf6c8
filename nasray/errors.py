"""The errors a user can mend; the command line prints each as one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a job, a file or an argument. Names the file, the key, the value and the fix."""


class InfeasibleError(UserError):
    """No architecture of the space satisfies the limits."""


class EvaluationError(RuntimeError):
    """An architecture could not be evaluated, however often it was tried."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the name in `known` that `word` is nearest to; "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
