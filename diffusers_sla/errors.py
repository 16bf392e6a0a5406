"""What this package raises.

    SLAError
    ├── SLAConfigError (ValueError)         a setting is out of range, unknown or contradicts another
    ├── SLAUnsupportedError (ValueError)    a model, layer or call that SLA cannot serve
    ├── SLAHubError (OSError)               the Hub cannot be reached, refuses, or has no such thing
    ├── SLADataError (ValueError)           training data is missing or wrong
    ├── SLATrainingError (RuntimeError)     a training run cannot go on
    └── SLAStateError (ValueError)          a state file is wrong
        ├── SLAStateNotFoundError (OSError)     no state file where one is needed
        ├── SLAStateFormatError                 truncated, foreign or damaged
        ├── SLAStateVersionError                written by a newer version
        ├── SLAStateMismatchError               does not fit the model: layers or shapes
        └── SLASettingsConflictError            its settings contradict the ones passed

Each is also the builtin that a caller who knows nothing of this package would catch. `diffusers_sla.kernel` can be
used on its own and raises plain builtins.
"""


class SLAError(Exception):
    """Base of everything this package raises on purpose."""


class SLAConfigError(SLAError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class SLAUnsupportedError(SLAError, ValueError):
    """A model, layer or call that SLA cannot serve."""


class SLAHubError(SLAError, OSError):
    """The Hub cannot be reached, refuses, or has no such repository, revision or file."""


class SLADataError(SLAError, ValueError):
    """Training data is missing or wrong."""


class SLATrainingError(SLAError, RuntimeError):
    """A training run cannot go on. Its last checkpoint is whole."""


class SLAStateError(SLAError, ValueError):
    """A state file is wrong. The model it was meant for is left as it was."""


class SLAStateNotFoundError(SLAStateError, OSError):
    """There is no state file where one is needed."""


class SLAStateFormatError(SLAStateError):
    """The file is truncated, damaged, or not an SLA state file."""


class SLAStateVersionError(SLAStateError):
    """The file was written by a newer version of the format than this package reads."""


class SLAStateMismatchError(SLAStateError):
    """The file does not fit the model: other layers or other shapes."""


class SLASettingsConflictError(SLAStateError):
    """The settings in the file contradict the ones the caller passed."""
