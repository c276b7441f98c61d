"""Options that keep clear of what goes wrong inside OpenVINO's own code generator.

A signal can't be caught as an error, and a file that was right where it was made may be loaded on fewer processors.
"""

from typing import Any

from tersor.core.machine import usable_cores
from tersor.core.records import BuildChoice

_PAIRED = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Power"}
_MATRIX = 2  # dimensions of samples with features
_FEWEST = 3  # products: with one residual block there is no chain to be fused
_CHAIN = 2  # products, of which some multiply codes


def options_around(model: Any, choice: BuildChoice) -> dict[str, str]:
    """Options for a model that must not be fused by OpenVINO's own code generator.

    On one thread 2026.4 fuses chains of products of [samples, features] and what stands between them. Both are right
    without the generator:

    * float32, a value inside of such a chain that is read again behind it (a residual addition), few samples:
      ``compile_model`` ends with a segmentation fault;
    * products of codes in such a chain: the scale that leads back to floats is lost, results are up to 1e5 times too
      large, in float32 and bfloat16.

    Args:
        model: As it is compiled.
        choice: Of threads and precision; where a process may use one processor alone, one thread is what runs.
    """
    if choice.device != "cpu" or min(choice.threads, usable_cores()) > 1:
        return {}
    products = coded = 0
    is_joined = False
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "MatMul" and _rank(node.input_value(0)) == _MATRIX:
            products += 1
            coded += node.input_value(0).get_node().get_type_name() == "FakeQuantize"
        elif kind in _PAIRED and _rank(node.output(0)) == _MATRIX:
            is_joined = is_joined or not any(_is_constant(node.input_value(i)) for i in (0, 1))
    crashes = choice.precision == "f32" and is_joined and products >= _FEWEST
    return {"SNIPPETS_MODE": "DISABLE"} if crashes or (coded and products >= _CHAIN) else {}


def _rank(port: Any) -> int:
    shape = port.get_partial_shape()
    return shape.rank.get_length() if shape.rank.is_static else -1


def _is_constant(port: Any) -> bool:
    """Whether a value depends on no input: a constant, or one behind ops of one operand."""
    node = port.get_node()
    while node.get_input_size() == 1:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
