"""ONNX Runtime on the CPU: one Backend. Importing it loads neither ONNX Runtime nor torch.

``build`` needs torch, onnx and onnxscript; ``load`` and what it returns need ONNX Runtime and
NumPy only, so artifacts run in an environment without the others.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.core.errors import ConfigError, MissingDependencyError
from tersor.core.records import ADD_PREFIX, BackendInfo, BuildChoice, Candidate, FormatInfo, Support
from tersor.core.support import support_of

if TYPE_CHECKING:  # annotations name these in full, so that run-time type checks find them
    import tersor.backends.onnxruntime.executable
    import tersor.graph.contracts

__all__ = ["ONNXRuntimeBackend"]

Shapes = Mapping[str, tuple[int, ...]]
_NAME = "onnxruntime"
_REMEDY = "pip install 'tersor[onnx]'"
_WRITERS = ("onnx", "onnxscript")  # what builds need beyond the runtime
_FULL_LIMIT = 127
_WAYS = ("floats", "integers")  # how int8 convolutions that can't be fused are computed
_CHOICES: tuple[Mapping[str, str | int | bool], ...] = tuple({"int8_conv": w} for w in _WAYS)


class ONNXRuntimeBackend:
    """ONNX Runtime's CPU execution provider."""

    def describe(self) -> BackendInfo:
        """Formats; the weight limit is measured. Without onnx it runs artifacts and builds none."""
        if find_spec("onnxruntime") is None:
            return BackendInfo(
                name=_NAME, available=False, reason="onnxruntime is not installed", remedy=_REMEDY
            )
        import onnxruntime

        version = str(onnxruntime.__version__)
        missing = [name for name in _WRITERS if find_spec(name) is None]
        if missing:
            reason = f"{missing[0]} is not installed: it runs artifacts and builds none"
            return BackendInfo(
                name=_NAME, available=True, version=version, reason=reason, remedy=_REMEDY
            )
        from tersor.backends.onnxruntime.probe import weight_limit

        limit = weight_limit()
        note = "" if limit == _FULL_LIMIT else "8-bit products saturate on this device"
        folded = "expanded to f32 on loading: smaller, not faster"
        return BackendInfo(
            name=_NAME,
            available=True,
            version=version,
            precisions=("f32",),
            formats=(
                FormatInfo(name="f32"),
                FormatInfo(name="int8", weight_limit=limit, note=note),
                FormatInfo(name="int8_weight", weight_limit=_FULL_LIMIT, note=folded),
            ),
            choices=_CHOICES,
        )

    def supports(self, candidate: Candidate) -> Support:
        """Whether the runtime has the candidate's format."""
        if candidate.site.startswith(ADD_PREFIX) and candidate.level not in ("f32", "bf16"):
            return Support(ok=False, reason="onnxruntime computes additions in floats here")
        return support_of(self.describe(), candidate)

    def build(
        self, graph: "tersor.graph.contracts.Graph", shapes: Shapes, choice: BuildChoice
    ) -> "tersor.backends.onnxruntime.executable.ONNXRuntimeExecutable":
        """Compile a graph; sizes beyond the batch may stay open (``graph.shapes.OPEN``).

        Raises:
            BackendError: An op without an ONNX form, or a build that ONNX Runtime refuses.
            ConfigError: A device or an option that this backend does not have.
            ShapeError: Shapes that the graph can't take.
        """
        _check(choice)
        _require(_NAME, *_WRITERS)
        from tersor.backends.onnxruntime.assembly import assemble
        from tersor.backends.onnxruntime.executable import ONNXRuntimeExecutable
        from tersor.graph.float8 import refuse_float8

        refuse_float8(graph.module, "onnxruntime")
        in_integers = choice.options.get("int8_conv", _WAYS[0]) == _WAYS[1]
        return ONNXRuntimeExecutable(assemble(graph, shapes, in_integers=in_integers), choice)

    def load(
        self, sections: Mapping[str, bytes], choice: BuildChoice
    ) -> "tersor.backends.onnxruntime.executable.ONNXRuntimeExecutable":
        """Compile what ``serialize`` gave.

        Raises:
            ArtifactError: A section is missing or damaged.
        """
        _check(choice)
        _require(_NAME)
        from tersor.backends.onnxruntime.executable import load

        return load(sections, choice)

    def read_file(
        self, path: str | Path, shapes: Shapes, choice: BuildChoice
    ) -> "tersor.backends.onnxruntime.executable.ONNXRuntimeExecutable":
        """Compile an ONNX file, at the given shapes.

        Raises:
            BackendError: ONNX Runtime can't read the file or compile the model.
        """
        _check(choice)
        _require(_NAME, *_WRITERS)
        from tersor.backends.onnxruntime.assembly import read_stored
        from tersor.backends.onnxruntime.executable import ONNXRuntimeExecutable

        return ONNXRuntimeExecutable(read_stored(Path(path), shapes), choice)


def _check(choice: BuildChoice) -> None:
    """Refuse a device, a precision or an option that is not here."""
    if choice.device != "cpu":
        raise ConfigError(
            f"onnxruntime: device {choice.device!r}, wanted cpu; use another backend for that "
            "device"
        )
    if choice.precision != "f32":
        raise ConfigError(f"onnxruntime: precision {choice.precision}, wanted f32")
    if choice.options.get("int8_conv", _WAYS[0]) not in _WAYS or set(choice.options) - {
        "int8_conv"
    }:
        raise ConfigError(
            f"onnxruntime: found options {dict(choice.options)}, wanted int8_conv as one of "
            f"{list(_WAYS)}"
        )


def _require(*packages: str) -> None:
    for name in packages:
        if find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed; {_REMEDY}")
