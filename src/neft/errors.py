"""The exception tree: every error that a user can meet is one of these.

    NeftError                exit code 1: the run failed
    ├── UsageError           exit code 2: what was asked for cannot be done as asked (also a ValueError)
    │   ├── RecipeError          a recipe that does not fit the schema; lists every fault
    │   ├── DataError            a data file, row or field that cannot be used
    │   ├── NeuronError          a neuron set, scores or budget that does not fit
    │   ├── ArchitectureError    a model whose projections cannot be found
    │   ├── CheckpointError      a checkpoint that is missing, torn or does not match
    │   └── AdapterError         an adapter folder that is missing, torn or does not match
    └── RunError             a run that broke down: a stage that failed, a folder in use
        ├── DivergenceError      a loss or gradient that is not finite
        └── OutOfMemoryError     too little memory, of the device or of the machine

Messages name the place, the value found there, and the remedy.
"""


class NeftError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class UsageError(NeftError, ValueError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe does not fit the schema."""


class DataError(UsageError):
    """A data file, row or field cannot be used."""


class NeuronError(UsageError):
    """A neuron set, scores or a budget does not fit."""


class ArchitectureError(UsageError):
    """A model's projections cannot be found."""


class CheckpointError(UsageError):
    """A checkpoint is missing, torn or does not match."""


class AdapterError(UsageError):
    """An adapter folder is missing, torn or does not match."""


class RunError(NeftError):
    """A run broke down."""


class DivergenceError(RunError):
    """A loss or gradient is not finite."""


class OutOfMemoryError(RunError):
    """The device, or the machine, has too little memory."""
