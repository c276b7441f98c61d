"""Weights as codes into small tables of values: which weights share a table, the best first tables, lookups.

Every block of neighbouring outputs (over all groups) x neighbouring inputs has one table of k entries,
ascending. ``codebook_fit`` improves codes and tables for the layer's output; ``packing`` stores them.

Axes: g groups, m outputs and n inputs of a group, b blocks of outputs, c blocks of inputs, k entries.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.grids import check_finite
from tersor.ops.kmeans import EXACT_WORK, optimal_codebooks

LARGEST_TABLE = 256  # codes are bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookScheme:
    """How many entries a table has, and which weights share one.

    Attributes:
        entries: 2 .. 256; 16 make codes of 4 bits.
        outputs: Neighbouring outputs, over all groups, that share a table; 0: all.
        inputs: Neighbouring inputs that share a table; 0: all.
        value_dtype: What tables are stored in.
    """

    entries: int = 16
    outputs: int = 0
    inputs: int = 0
    value_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 2 <= self.entries <= LARGEST_TABLE:
            raise ConfigError(f"entries must be 2..{LARGEST_TABLE}, got {self.entries}")
        if self.outputs < 0 or self.inputs < 0:
            raise ConfigError(
                f"outputs {self.outputs} and inputs {self.inputs} that share a table must be >= 0; 0 is all"
            )
        if not self.value_dtype.is_floating_point:
            raise ConfigError(f"value_dtype must be a float type, got {self.value_dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """Codes and the tables they point into; the first of ``b`` blocks of outputs has tables[0]."""

    codes: UInt8[Tensor, "g m n"]
    tables: Float64[Tensor, "b c k"]  # ascending


def first_tables(
    weight: Float[Tensor, "g m n"],
    importance: Float[Tensor, "g n"],
    scheme: CodebookScheme,
    exact_work: int = EXACT_WORK,
) -> tuple[Float64[Tensor, "b c k"], float]:
    """Exact k-means of the weights of each table: least sum_ij h_j (w_ij - q_ij)^2.

    Args:
        weight: Weight; read only.
        importance: h >= 0 of each input. The diagonal of H is best if every weight takes its nearest entry.
        scheme: Tables.
        exact_work: Values times entries of a table beyond which neighbours are merged first.

    Returns:
        Tables, and the share of their error that merging neighbours hid (see ``optimal_codebooks``).

    Raises:
        ShapeError: Blocks that do not divide the weight.
        NumericalError: The weight is not finite.
    """
    check_finite(weight, "weight")
    b, c = _blocks(weight, scheme)
    counted = importance.unsqueeze(1).expand_as(weight)
    values = _by_table(weight, b, c), _by_table(counted, b, c)
    found = optimal_codebooks(*values, scheme.entries, exact_work)
    total = float(found.errors[:, -1].sum())
    merged = float(found.merged.sum()) / total if total > 0 else 0.0
    return found.tables.reshape(b, c, scheme.entries), merged


def decode(codebook: Codebook) -> Float64[Tensor, "g m n"]:
    """The weight: the entry of each code in the table of its block."""
    return looked_up(codebook.codes, codebook.tables)


def nearest_codes(
    weight: Float[Tensor, "g m n"], tables: Float64[Tensor, "b c k"]
) -> UInt8[Tensor, "g m n"]:
    """Code of the nearest entry of each weight's table; ties go to the lower one."""
    b, c, k = tables.shape
    values = _by_table(weight.to(torch.float64), b, c).contiguous()
    codes = torch.searchsorted(_bounds(tables).reshape(b * c, k - 1), values)
    return _from_tables(codes.to(torch.uint8), b, c, weight.shape)


def looked_up(
    codes: UInt8[Tensor, "g m n"], tables: Shaped[Tensor, "b c k"]
) -> Shaped[Tensor, "g m n"]:
    """What the table of its block holds at each code."""
    b, c, _ = tables.shape
    found = tables.flatten(0, 1).gather(1, _by_table(codes, b, c).long())
    return _from_tables(found, b, c, codes.shape)


def gathered(codebook: Codebook, values: Float64[Tensor, "g m n"]) -> Float64[Tensor, "b ck"]:
    """Sum of the values that belong to each entry."""
    b, c, k = codebook.tables.shape
    sums = values.new_zeros(b * c, k)
    sums.scatter_add_(1, _by_table(codebook.codes, b, c).long(), _by_table(values, b, c))
    return sums.reshape(b, c * k)


def ascending(codebook: Codebook) -> Codebook:
    """The same weight with sorted tables."""
    tables, order = codebook.tables.sort(dim=2, stable=True)
    places = order.argsort(dim=2)
    codes = looked_up(codebook.codes, places).to(torch.uint8)
    return Codebook(codes=codes, tables=tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnTables:
    """Tables as the loops over columns need them."""

    tables: tuple[Float64[Tensor, "b k"], ...]  # by block of inputs
    bounds: tuple[Float64[Tensor, "b edges"], ...]
    width: int  # inputs that share a table

    @classmethod
    def of(cls, tables: Float64[Tensor, "b c k"], shape: torch.Size) -> "ColumnTables":
        """For weights of this shape [g, m, n]."""
        return cls(
            tables=tables.transpose(0, 1).contiguous().unbind(0),
            bounds=_bounds(tables).transpose(0, 1).contiguous().unbind(0),
            width=shape[2] // tables.shape[1],
        )

    def nearest(
        self, column: int, values: Float64[Tensor, "g m"]
    ) -> tuple[Int64[Tensor, "g m"], Float64[Tensor, "g m"]]:
        """Codes and entries of the values of one column."""
        block = column // self.width
        rows = values.reshape(len(self.tables[block]), -1).contiguous()
        codes = torch.searchsorted(self.bounds[block], rows)
        entries = self.tables[block].gather(1, codes)
        return codes.reshape(values.shape), entries.reshape(values.shape)


def _bounds(tables: Float64[Tensor, "b c k"]) -> Float64[Tensor, "b c edges"]:
    """Where the nearest entry changes."""
    return (tables[:, :, 1:] + tables[:, :, :-1]) / 2


def _blocks(weight: Float[Tensor, "g m n"], scheme: CodebookScheme) -> tuple[int, int]:
    """How many blocks of outputs and inputs."""
    groups, outputs, inputs = weight.shape
    counts = []
    for name, total, share in (
        ("outputs", groups * outputs, scheme.outputs),
        ("inputs", inputs, scheme.inputs),
    ):
        size = share or total
        if not size or total % size:
            raise ShapeError(
                f"weight {tuple(weight.shape)} [group, out, in]: {total} {name} do not split into blocks of {share}; "
                f"use a divisor of {total}, or 0 for one block"
            )
        counts.append(total // size)
    return counts[0], counts[1]


def _by_table(values: Shaped[Tensor, "g m n"], b: int, c: int) -> Shaped[Tensor, "bc members"]:
    rows = values.reshape(b, -1, c, values.shape[2] // c)
    return rows.transpose(1, 2).reshape(b * c, -1)


def _from_tables(
    values: Shaped[Tensor, "bc members"], b: int, c: int, shape: torch.Size
) -> Shaped[Tensor, "g m n"]:
    rows = values.reshape(b, c, -1, shape[2] // c).transpose(1, 2)
    return rows.reshape(shape).contiguous()
