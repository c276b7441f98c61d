"""OpenVINO on the CPU: one Backend. Importing it loads neither OpenVINO nor torch.

``build`` needs torch; ``describe``, ``load`` and what they return need OpenVINO and NumPy only,
so artifacts run in an environment without torch.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.core.errors import ConfigError, MissingDependencyError
from tersor.core.records import BackendInfo, BuildChoice, Candidate, FormatInfo, Support
from tersor.core.support import support_of

if TYPE_CHECKING:  # annotations name these in full, so that run-time type checks find them
    import tersor.backends.openvino.executable
    import tersor.graph.contracts

__all__ = ["OpenVINOBackend", "executable_from_model", "export_ir", "to_openvino_model"]

Shapes = Mapping[str, tuple[int, ...]]
_NAME = "openvino"
_REMEDY = "pip install 'tersor[openvino]'"
_LINEARS = ("linear", "convolution")  # how int8 linears are lowered
_CHOICES: tuple[Mapping[str, str | int | bool], ...] = tuple({"int8_linear": w} for w in _LINEARS)


class OpenVINOBackend:
    """OpenVINO's CPU plug-in."""

    def describe(self) -> BackendInfo:
        """Formats and precisions as the device reports them; the weight limit is measured."""
        if find_spec("openvino") is None:
            return BackendInfo(
                name=_NAME, available=False, reason="openvino is not installed", remedy=_REMEDY
            )
        import openvino as ov

        from tersor.backends.openvino.executable import capabilities

        able = capabilities()
        return BackendInfo(
            name=_NAME,
            available=True,
            version=str(ov.__version__),
            precisions=("f32", "bf16") if "BF16" in able else ("f32",),
            formats=_formats(able),
            choices=_CHOICES,
        )

    def supports(self, candidate: Candidate) -> Support:
        """Whether the device runs the candidate's format."""
        return support_of(self.describe(), candidate)

    def build(
        self, graph: "tersor.graph.contracts.Graph", shapes: Shapes, choice: BuildChoice
    ) -> "tersor.backends.openvino.executable.OpenVINOExecutable":
        """Compile a graph; sizes beyond the batch may stay open (``graph.shapes.OPEN``).

        Raises:
            BackendError: An op without conversion, or a build that OpenVINO refuses.
            ConfigError: A device or an option that this backend does not have.
            ShapeError: Shapes that the graph can't take.
        """
        from tersor.graph.float8 import refuse_float8

        refuse_float8(graph.module, "openvino")
        return executable_from_model(to_openvino_model(graph, shapes, choice), choice)

    def load(
        self, sections: Mapping[str, bytes], choice: BuildChoice
    ) -> "tersor.backends.openvino.executable.OpenVINOExecutable":
        """Compile what ``serialize`` gave.

        Raises:
            ArtifactError: A section is missing or damaged.
        """
        _require()
        from tersor.backends.openvino.executable import load

        return load(sections, choice)

    def export_ir(
        self,
        graph: "tersor.graph.contracts.Graph",
        shapes: Shapes,
        choice: BuildChoice,
        path: str | Path,
    ) -> None:
        """Write ``path`` (.xml) and the .bin beside it, which stock OpenVINO reads."""
        export_ir(graph, shapes, choice, path)

    def read_file(
        self, path: str | Path, shapes: Shapes, choice: BuildChoice
    ) -> "tersor.backends.openvino.executable.OpenVINOExecutable":
        """Compile a model file that OpenVINO reads (.xml, .onnx), at the given shapes.

        Raises:
            BackendError: OpenVINO can't read the file or compile the model.
        """
        _require()
        from tersor.backends.openvino.executable import read_file

        return read_file(path, shapes, choice)


def to_openvino_model(
    graph: "tersor.graph.contracts.Graph", shapes: Shapes, choice: BuildChoice
) -> Any:
    """The ov.Model that ``build`` would compile, with the given shapes; integers stay integers.

    Args:
        graph: Read only.
        shapes: By input name; inputs that are not listed keep an open batch.
        choice: Its option ``int8_linear`` says how int8 linears are written.
    """
    _require()
    from tersor.backends.openvino.assembly import assemble
    from tersor.backends.openvino.executable import check_choice

    check_choice(choice)
    lowering = choice.options.get("int8_linear", _LINEARS[0])
    unknown = sorted(set(choice.options) - {"int8_linear"})
    if lowering not in _LINEARS or unknown:
        raise ConfigError(
            f"openvino: found options {dict(choice.options)}, wanted int8_linear as one of "
            f"{list(_LINEARS)}"
        )
    return assemble(graph, shapes, linear_as_convolution=lowering == "convolution")


def executable_from_model(
    model: Any, choice: BuildChoice
) -> "tersor.backends.openvino.executable.OpenVINOExecutable":
    """Compile any ov.Model with a concrete batch exactly as ``build`` compiles its own."""
    _require()
    from tersor.backends.openvino.executable import OpenVINOExecutable

    return OpenVINOExecutable(model, choice)


def export_ir(
    graph: "tersor.graph.contracts.Graph",
    shapes: Shapes,
    choice: BuildChoice,
    path: str | Path,
) -> None:
    """Write ``path`` (.xml) and the .bin beside it, which stock OpenVINO reads.

    Raises:
        ConfigError: A path that does not end in .xml.
        BackendError: A graph that can't be converted.
        StoreError: A folder that can't be written.
    """
    target = Path(path)
    if target.suffix != ".xml":
        raise ConfigError(f"{target}: found suffix {target.suffix!r}, wanted .xml")
    from tersor.backends.openvino.executable import written
    from tersor.core.store import write_atomic

    model = to_openvino_model(graph, shapes, choice)
    xml, weights = written(model)
    write_atomic(target.with_suffix(".bin"), weights)
    write_atomic(target, xml)


def _formats(able: tuple[str, ...]) -> tuple[FormatInfo, ...]:
    from tersor.backends.openvino.probe import FULL_LIMIT, weight_limit

    found = [FormatInfo(name="f32")]
    if "BF16" in able:
        found.append(FormatInfo(name="bf16"))
    if "INT8" in able:
        limit = weight_limit()
        note = "" if limit == FULL_LIMIT else "8-bit products saturate on this device"
        found.append(FormatInfo(name="int8", weight_limit=limit, note=note))
    note = "expanded to f32 on loading: smaller, not faster"
    found.append(FormatInfo(name="int8_weight", weight_limit=FULL_LIMIT, note=note))
    return tuple(found)


def _require() -> None:
    if find_spec("openvino") is None:
        raise MissingDependencyError(f"openvino is not installed; {_REMEDY}")
