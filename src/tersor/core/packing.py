"""How a weight lies in few bits: a grid, tables of values, or a mask with the values that it keeps.

The weight is seen as rows, one an output, of all its inputs. A packed weight is one block of bytes;
its parts lie in this order, each at a whole byte:

* ``grid``: codes of ``bits``, every row a bit stream of its own; then the steps, float16, row by row.
* ``table``: codes of 4 or 8 bits, likewise, from 0; then the entries of the tables, float16.
* ``sparse``: the mask, one bit a weight; the steps, one a row; then the codes of the kept weights, one
  bit stream. With 32 bits there are no steps, and the values are float32.

A bit stream begins with the least significant bit of its first byte, and so does every code in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tersor.core.errors import ConfigError

PackingKind = Literal["grid", "table", "sparse", "pairs"]
FLOAT_BITS = 32
MAX_RANK = 8  # a weight of a convolution has five at most
STEP_BYTES = ENTRY_BYTES = 2  # float16
_BITS: dict[PackingKind, tuple[int, ...]] = {
    "grid": tuple(range(2, 9)),
    "table": (4, 8),
    "sparse": (*range(2, 9), FLOAT_BITS),
    "pairs": (*range(2, 9), FLOAT_BITS),
}
# The places of the two in a group of four, by number.
PLACES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
GROUP, GROUPS_OF_BYTE = 4, 3
_SMALL_ORDER = 2**16  # so many inputs have uint16 numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The layout of one packed weight.

    Attributes:
        shape: Of the weight, outputs first.
        bits: Of a code.
        group: Of a grid: neighbouring inputs that share a step; 0: all of an output.
        per_output: Of tables: one for each output; else one for all.
        kept: Of a sparse weight: how many are not dropped.

    Raises:
        ConfigError: No such layout.
    """

    kind: PackingKind
    shape: tuple[int, ...]
    bits: int
    group: int = 0
    per_output: bool = False
    kept: int = 0

    def __post_init__(self) -> None:
        if self.bits not in _BITS[self.kind]:
            raise ConfigError(f"{self.kind}: found {self.bits} bits, wanted {_BITS[self.kind]}")
        if not 0 < len(self.shape) <= MAX_RANK or min(self.shape) < 1:
            raise ConfigError(
                f"{self.kind}: found shape {self.shape[:MAX_RANK]}, wanted 1 to {MAX_RANK} sizes of 1 "
                "or more"
            )
        if self.group < 0 or not 0 <= self.kept <= math.prod(self.shape):
            raise ConfigError(
                f"{self.kind} of shape {self.shape}: found groups of {self.group} and {self.kept} "
                "kept weights, wanted neither below 0 nor more weights than there are"
            )

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.shape[0]

    @property
    def inputs(self) -> int:
        """Weights of a row."""
        return math.prod(self.shape[1:])

    @property
    def steps(self) -> int:
        """Steps of a row of a grid."""
        return -(-self.inputs // self.group) if self.group else 1

    @property
    def fours(self) -> int:
        """Groups of four inputs in a row; the last one may go beyond the inputs."""
        return -(-self.inputs // GROUP)

    @property
    def order_type(self) -> str:
        """NumPy's name for the numbers of the inputs of ``pairs``."""
        return "<u2" if self.inputs <= _SMALL_ORDER else "<u4"

    @property
    def tables(self) -> int:
        """Tables."""
        return self.outputs if self.per_output else 1

    def parts(self) -> tuple[int, ...]:
        """Bytes of each part, in order."""
        row = _bytes(self.inputs, self.bits)
        if self.kind == "grid":
            return self.outputs * row, self.outputs * self.steps * STEP_BYTES
        if self.kind == "table":
            return self.outputs * row, self.tables * 2**self.bits * ENTRY_BYTES
        steps = 0 if self.bits == FLOAT_BITS else self.outputs * STEP_BYTES
        if self.kind == "pairs":
            groups = self.outputs * self.fours
            order = int(self.order_type[-1]) * self.inputs
            ways = -(-groups // GROUPS_OF_BYTE)
            return order, ways, steps, _bytes(len(PLACES[0]) * groups, self.bits)
        return _bytes(self.outputs * self.inputs, 1), steps, _bytes(self.kept, self.bits)

    def size_bytes(self) -> int:
        """Bytes of the whole block."""
        return sum(self.parts())

    def resized(self, shape: Sequence[int]) -> "Packing":
        """The same layout for a weight that has lost rows or inputs; a sparse one keeps its share."""
        kept = round(self.kept * math.prod(shape) / math.prod(self.shape))
        return replace(self, shape=tuple(shape), kept=kept)


def _bytes(codes: int, bits: int) -> int:
    return -(-codes * bits // 8)
