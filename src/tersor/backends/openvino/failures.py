"""What OpenVINO reports becomes an error that says which op failed and what to do."""

import re
from collections.abc import Mapping

from tersor.core.errors import BackendError, ShapeError

_LISTS = re.compile(r"(?:No conversion rule found for operations|Conversion is failed for): (.+)")
_PLACE = re.compile(r".*failed at \S+:\d+:", re.DOTALL)  # in OpenVINO's sources: of no use here
_SHOWN = 400  # characters of a foreign message


def reason(error: Exception) -> str:
    """What OpenVINO says, on one line and without the places in its sources."""
    return " ".join(_PLACE.sub("", str(error)).split())[:_SHOWN]


def conversion_failed(error: Exception) -> BackendError:
    """The error for a graph that could not be converted, with the names of the ops."""
    text = str(error)
    ops = sorted({op.strip() for line in _LISTS.findall(text) for op in line.split(",")})
    named = [op for op in ops if "." in op and not op.startswith("inlined.")]
    ops = named or ops  # without what only follows from them
    if ops:
        return BackendError(
            f"openvino: no conversion for {', '.join(ops)}; wanted ops that its PyTorch frontend "
            "knows. Write them with other ops in the model, or use another backend"
        )
    return BackendError(
        f"openvino: the graph could not be converted: {reason(error)}. Use another backend, or "
        "report the model"
    )


def compilation_failed(error: Exception, doing: str) -> BackendError:
    """The error for a model that could not be compiled or run."""
    return BackendError(
        f"openvino: {doing} failed: {reason(error)}. Try other build options, or another backend"
    )


def shapes_refused(error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> ShapeError:
    """The error for shapes that the graph can't take."""
    return ShapeError(
        f"openvino: the graph can't take the shapes {dict(shapes)}: {reason(error)}; wanted "
        "those of the captured inputs, with any batch"
    )
