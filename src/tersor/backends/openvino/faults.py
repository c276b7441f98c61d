"""Options that keep clear of what crashes inside OpenVINO: a signal can't be caught as an error."""

from typing import Any

from tersor.core.records import BuildChoice

_PAIRED = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Power"}
_MATRIX = 2  # dimensions of samples with features
_FEWEST = 3  # products: with one residual block there is no chain to be fused


def options_around(model: Any, choice: BuildChoice) -> dict[str, str]:
    """Options for a model that must not be fused by OpenVINO's own code generator.

    2026.4 fuses chains of products of [samples, features] and what stands between them for one thread in
    float32. Where a value inside of such a chain is read again behind it (a residual addition) and the samples
    are few, ``compile_model`` ends with a segmentation fault. Without the generator the answers are right.

    Args:
        model: As it is compiled.
        choice: Of threads and precision.
    """
    if choice.threads != 1 or choice.precision != "f32" or choice.device != "cpu":
        return {}
    products = 0
    is_joined = False
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "MatMul" and _rank(node.input_value(0)) == _MATRIX:
            products += 1
        elif kind in _PAIRED and _rank(node.output(0)) == _MATRIX:
            is_joined = is_joined or not any(_is_constant(node.input_value(i)) for i in (0, 1))
    return {"SNIPPETS_MODE": "DISABLE"} if is_joined and products >= _FEWEST else {}


def _rank(port: Any) -> int:
    shape = port.get_partial_shape()
    return shape.rank.get_length() if shape.rank.is_static else -1


def _is_constant(port: Any) -> bool:
    """Whether a value depends on no input: a constant, or one behind ops of one operand."""
    node = port.get_node()
    while node.get_input_size() == 1:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
