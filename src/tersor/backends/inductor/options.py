"""What a build of this backend may decide, and which uncompressed builds are worth measuring."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tersor.core.errors import ConfigError
from tersor.core.records import BuildChoice, FloatChoice, Precision

# eager: torch's own kernels; compile, autotune: torch.compile, in its default mode and with kernels
# chosen by measurement; package: compiled ahead of time, for a file.
Mode = Literal["eager", "compile", "autotune", "package"]
_HALVES = ("bfloat16", "float16")
_LAYOUTS = ("contiguous", "channels_last")
_WEIGHTS = ("floats", "codes")
_BLOCKS = ("ops", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a build choice.

    Attributes:
        mode: Who makes the kernels.
        graph: Launches are recorded once and replayed (CUDA only).
        half: The type of 16-bit floats.
        layout: Of images.
        tf32: Products of float32 in 19 bits (CUDA only).
        tuned: A package whose kernels are chosen by measurement, as "autotune" does.
        weights: Of linears, where they are stored as codes: expanded to floats when the model is built, or
            read as codes by every call.
        blocks: Residual blocks of few channels (in 16 bits with channels last), and linears and attentions of narrow
            transformers with what is around them (in 16 bits): op by op, or one op each.
    """

    mode: Mode = "eager"
    graph: bool = False
    half: str = "bfloat16"
    layout: str = "contiguous"
    tf32: bool = False
    tuned: bool = False
    weights: str = "floats"
    blocks: str = "ops"


_WANTED: Mapping[str, tuple[Any, ...]] = {
    "mode": get_args(Mode),
    "graph": (False, True),
    "half": _HALVES,
    "layout": _LAYOUTS,
    "tf32": (False, True),
    "tuned": (False, True),
    "weights": _WEIGHTS,
    "blocks": _BLOCKS,
}


def read_options(choice: BuildChoice) -> Options:
    """The options of a choice.

    Raises:
        ConfigError: An option or a value that there is not.
    """
    for name, value in choice.options.items():
        if name not in _WANTED or value not in _WANTED[name]:
            wanted = "; ".join(f"{n}: {list(values)}" for n, values in _WANTED.items())
            raise ConfigError(f"inductor: found option {name}={value!r}, wanted {wanted}")
    found = Options(**choice.options)  # type: ignore[arg-type]
    if found.blocks == "fused" and choice.precision == "f32":
        raise ConfigError(
            f"inductor: found blocks='fused' with precision {choice.precision}, wanted bf16, which its kernels read"
        )
    if found.tuned and found.mode != "package":
        raise ConfigError(
            f"inductor: found tuned=True with mode={found.mode!r}, wanted mode='package'; without one the "
            "search is mode='autotune'"
        )
    is_cpu = choice.device == "cpu"
    if is_cpu and (found.graph or found.tf32):
        raise ConfigError("inductor: graph and tf32 are for CUDA devices; leave them out on cpu")
    if choice.precision not in ("f32", "bf16"):
        raise ConfigError(f"inductor: precision {choice.precision}, wanted f32 or bf16")
    return found


def float_choices(device: str, *, can_compile: bool) -> tuple[FloatChoice, ...]:
    """The uncompressed builds that are worth measuring on a kind of device."""
    modes: tuple[Mode, ...] = ("eager", "compile") if can_compile else ("eager",)
    if device == "cpu":
        modes += ("package",) if can_compile else ()
        return tuple(
            FloatChoice(precision=p, options={"mode": m}) for p in ("f32", "bf16") for m in modes
        )
    kinds: tuple[tuple[Precision, dict[str, str | int | bool]], ...] = (
        ("f32", {}),
        ("f32", {"tf32": True}),
        ("bf16", {}),
        ("bf16", {"half": "float16"}),
    )
    plain = [
        FloatChoice(precision=precision, options={"mode": mode, "graph": graph, **more})
        for precision, more in kinds
        for mode, graph in (("eager", False), *((m, True) for m in modes))
        if graph or not more
    ]
    if can_compile:  # a search of minutes for every build
        searched: dict[str, str | int | bool] = {"mode": "autotune", "graph": True}
        plain.append(FloatChoice(precision="bf16", options=searched, quick={"mode": "compile"}))
    images = [
        replace(c, options={**c.options, "layout": "channels_last"})
        for c in plain
        if c.precision == "bf16" and c.options["graph"]
    ]
    fused = [
        replace(c, options={**c.options, "blocks": "fused"})
        for c in (*(p for p in plain if p.precision == "bf16" and p.options["graph"]), *images)
        if c.options["mode"] == "compile"
    ]
    return (*plain, *images, *fused)


def stored_choices(device: str, *, has_kernels: bool) -> tuple[Mapping[str, str | int | bool], ...]:
    """Option sets that are worth measuring beside the default where weights may be packed."""
    return ({"weights": "codes"},) if device == "cuda" and has_kernels else ()
