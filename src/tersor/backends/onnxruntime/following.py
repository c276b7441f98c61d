"""What stands between a convolution and its readers' quantiser, and works on codes as well.

Rounding is monotone: the codes of clipped values are the clipped codes, those of the largest value the
largest code, and a border of a constant is one of its code.
"""

import math
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from tersor.graph.split import Activation

_LAST = 255  # code
_PLAIN = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


def code_of(value: float, activation: Activation) -> int:
    """The code of a value on a grid, as QuantizeLinear gives it."""
    zero = activation.zero_point - activation.low
    if math.isinf(value):
        return _LAST if value > 0 else 0
    steps = float(np.rint(np.float32(value) / np.float32(activation.step)))
    return int(min(max(steps + zero, 0), _LAST))


class Following:
    """The nodes of a graph whose constants are known."""

    def __init__(self, graph: Any) -> None:
        self._values = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._values[node.output[0]] = node.attribute[0].t

    def allows(self, node: Any) -> bool:
        """Whether a node may stand there."""
        if node.op_type == "Pad":
            modes = [helper.get_attribute_value(a) for a in node.attribute if a.name == "mode"]
            known = len(node.input) < 3 or self._number(node.input[2]) is not None
            return modes in ([], [b"constant"]) and known
        return node.op_type in _PLAIN or self.ends(node) is not None

    def ends(self, node: Any) -> tuple[float, float] | None:
        """What a node clips to; None where it clips nothing, or to values that are computed."""
        if node.op_type == "Relu":
            return 0.0, math.inf
        if node.op_type != "Clip":
            return None
        given = [*node.input[1:3], "", ""][:2]
        low = self._number(given[0]) if given[0] else -math.inf
        high = self._number(given[1]) if given[1] else math.inf
        return None if low is None or high is None else (low, high)

    def padding(self, node: Any) -> float:
        """What a padding puts around a tensor."""
        return (self._number(node.input[2]) or 0.0) if len(node.input) > 2 else 0.0

    def _number(self, name: str) -> float | None:
        if not name:
            return 0.0
        tensor = self._values.get(name)
        return None if tensor is None else float(numpy_helper.to_array(tensor).reshape(-1)[0])
