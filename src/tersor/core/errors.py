"""One class for each cause that a caller can act on.

Every message says where, what was found, what was wanted and the way out. ``exit_code`` is what
the command line returns for the cause: 2 wrong use or bad input, 3 environment, 4 verification.
"""

from typing import ClassVar


class TersorError(Exception):
    """Base of all errors that Tersor raises on purpose."""

    exit_code: ClassVar[int] = 2


class ConfigError(TersorError):
    """An option has a value that it can't have."""


class TargetError(TersorError):
    """A target is unreadable or contradicts itself."""


class DataError(TersorError):
    """The representative inputs can't be used: empty, labelled, of another type or not finite."""


class MetricError(TersorError):
    """The caller's metric raised, or returned something that is no score."""


class ShapeError(TersorError):
    """Tensors or sizes that do not fit together."""


class NumericalError(TersorError):
    """Arithmetic that can't be carried out: not finite, or singular after damping."""


class CaptureError(TersorError):
    """The model can't be exported as one graph."""


class WeightError(TersorError):
    """A parameter of the model is not finite or of a type that is not supported."""


class SiteNotFoundError(TersorError):
    """A name or pattern that matches no site of the model."""


class GuardError(TersorError):
    """A guard rejected an input or an output at run time."""


class MissingDependencyError(TersorError):
    """A package that this call needs is not installed."""

    exit_code: ClassVar[int] = 3


class BackendError(TersorError):
    """A backend is not available here, or failed to build or run a graph."""

    exit_code: ClassVar[int] = 3


class MeasurementError(TersorError):
    """A time that can't be: the clock stood still or went back."""

    exit_code: ClassVar[int] = 3


class RankError(TersorError):
    """Another rank of a distributed run stopped, is silent, or works on something else."""

    exit_code: ClassVar[int] = 3


class StoreError(TersorError):
    """The cache directory can't be read or written."""

    exit_code: ClassVar[int] = 3


class ArtifactError(TersorError):
    """A file is no artifact, is damaged or was edited."""

    exit_code: ClassVar[int] = 4


class NoFileError(ArtifactError):
    """There is no file to read at the path of an artifact: wrong use, and nothing was tampered with."""

    exit_code: ClassVar[int] = 2


class ParityError(TersorError):
    """Two forms of one model disagree by more than rounding explains."""

    exit_code: ClassVar[int] = 4
