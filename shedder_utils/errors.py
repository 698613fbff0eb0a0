"""The errors of this package: what went wrong, in one line that a user can act on.

Every message names the thing, what was expected, what was found and what to do.
"""


class ShedderError(Exception):
    """Base class: a mistake in the input or the environment, reported as one line without a traceback."""


class ModelError(ShedderError):
    """A model or checkpoint cannot be loaded, or is not what the request needs."""


class PlanError(ShedderError):
    """A plan, or a component in it, does not fit the model."""


class NothingLeftError(PlanError):
    """A search has taken all that it may take."""


class BudgetMissedError(PlanError):
    """A search has made all its removals, and they save less than was asked for."""


class DataError(ShedderError):
    """Calibration text, a task or a table of the paper is missing or malformed."""


class ProfileError(ShedderError):
    """A profile is unknown, malformed or carries a key that does not exist."""


class RecordError(ShedderError):
    """A record cannot be read, was changed after it was written, or cannot be stored."""
