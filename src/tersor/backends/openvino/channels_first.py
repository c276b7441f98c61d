"""Integer linears as 1x1 convolutions: the way into that layout, the way out, and what cancels.

On processors without dot-product instructions OpenVINO runs an int8 MatMul through a reference
GEMM that is slower than float32, but an int8 1x1 convolution through a fast kernel. A tensor
[.., T, C] becomes [B, C, 1, T]; in memory nothing moves, because convolutions keep their channels
innermost. Which of the two is faster is measured, never assumed (``BackendInfo.choices``).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import opset13 as op

RANKS = (2, 3, 4)  # of a linear's input: [T, C], [B, T, C], [B, H, W, C]
# Dimensions of size 1 that make it [B, H, W, C]. Not [B, T, 1, C]: OpenVINO 2026.4 merges the way
# out of that with a transposition behind it into a wrong one (silently; a test guards the case).
_INSERTED = {2: (0, 1), 3: (1,), 4: ()}
_TO_CHANNELS_FIRST = (0, 3, 1, 2)
_TO_CHANNELS_LAST = (0, 2, 3, 1)
_ELEMENT_WISE = {
    *("Abs", "Add", "Clamp", "Divide", "Elu", "Erf", "Exp", "FakeQuantize", "Gelu", "HSigmoid"),
    *("HSwish", "Maximum", "Minimum", "Mish", "Multiply", "Negative", "Power", "Relu", "Sigmoid"),
    *("SoftPlus", "Sqrt", "Subtract", "Swish", "Tanh"),
}


def integers(*values: int) -> Any:
    """A constant vector of int64."""
    return op.constant(np.array(values, np.int64))


def enter(source: Any, rank: int, name: str) -> Any:
    """[.., T, C] -> [B, C, 1, T] (or [B, C, H, W]); returns the output."""
    if _INSERTED[rank]:
        source = op.unsqueeze(source, integers(*_INSERTED[rank])).output(0)
    turned = op.transpose(source, integers(*_TO_CHANNELS_FIRST))
    turned.set_friendly_name(name)
    return turned.output(0)


def leave(source: Any, rank: int, name: str) -> Any:
    """The inverse of ``enter``; returns the output."""
    turned = op.transpose(source, integers(*_TO_CHANNELS_LAST))
    if _INSERTED[rank]:
        turned = op.squeeze(turned, integers(*_INSERTED[rank]))
    turned.set_friendly_name(name)
    return turned.output(0)


def turn_constant(array: NDArray[Any], rank: int) -> NDArray[Any]:
    """What broadcasts against [.., T, C] so that it broadcasts against [B, C, 1, T]."""
    if array.size == 1:
        return array.reshape(())
    aligned = array.reshape([1] * (rank - array.ndim) + list(array.shape))
    return np.transpose(np.expand_dims(aligned, _INSERTED[rank]), _TO_CHANNELS_FIRST)


@dataclass(slots=True)
class Crossings:
    """Where a model changes into the layout and out of it.

    Attributes:
        entries: Entered output by the tensor that it was made from.
        exits: By name of the last node of a way out: the tensor before it, and the rank after it.
    """

    entries: dict[str, tuple[Any, int]] = field(default_factory=dict)
    exits: dict[str, tuple[Any, int]] = field(default_factory=dict)

    def enter(self, source: Any, rank: int, name: str) -> Any:
        """One way in for all readers of a tensor."""
        key = _key(source)
        if key not in self.entries:
            self.entries[key] = (enter(source, rank, name), rank)
        return self.entries[key][0]

    def leave(self, source: Any, rank: int, name: str) -> Any:
        """A way out, remembered so that ``cancel`` can move it."""
        output = leave(source, rank, name)
        self.exits[_key(output)] = (source, rank)
        return output

    def cancel(self, model: Any) -> None:
        """Move ways out behind element-wise ops, and drop those that a way in follows.

        The arithmetic does not change: only the order of element-wise ops and transpositions.
        """
        for node in model.get_ordered_ops():
            if node.get_type_name() in _ELEMENT_WISE:
                self._sink(node)
        for key, (entered, rank) in self.entries.items():
            inside, left_rank = self.exits.get(key, (None, 0))
            if inside is not None and left_rank == rank:
                _redirect(entered, inside)

    def _sink(self, node: Any) -> None:
        ranks = {self.exits[_key(s)][1] for s in node.input_values() if _key(s) in self.exits}
        if len(ranks) != 1:
            return
        rank = ranks.pop()
        turned = [self._inside(source, rank) for source in node.input_values()]
        shape = node.get_output_partial_shape(0)
        if any(t is None for t in turned) or shape.rank.get_length() != rank:
            return
        output = node.output(0)
        old_key, readers = _key(output), list(output.get_target_inputs())
        for position, source in enumerate(turned):
            node.input(position).replace_source_output(source)
        node.validate_and_infer_types()
        left = self.leave(output, rank, f"{node.get_friendly_name()}/ChannelsLast")
        for reader in readers:
            reader.replace_source_output(left)
        if old_key in self.entries:  # made from this node: now it is made from the way out
            self.entries[_key(left)] = self.entries.pop(old_key)

    def _inside(self, source: Any, rank: int) -> Any:
        key, node = _key(source), source.get_node()
        if key in self.exits:
            return self.exits[key][0]
        if node.get_type_name() != "Constant" or len(source.get_shape()) > rank:
            return None
        if source.get_element_type().is_real():
            constant = op.constant(turn_constant(np.array(node.data), rank))
            constant.set_friendly_name(node.get_friendly_name())
            return constant.output(0)
        return None


def _redirect(old: Any, new: Any) -> None:
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _key(output: Any) -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"
