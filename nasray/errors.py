"""The errors a user can mend; the command line prints each as one line."""


class UserError(ValueError):
    """A mistake in a job, a file or an argument. Names the file, the key, the value and the fix."""


class InfeasibleError(UserError):
    """No architecture of the space satisfies the limits."""


class EvaluationError(RuntimeError):
    """An architecture could not be evaluated, however often it was tried."""
