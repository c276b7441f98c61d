"""Codes, steps, tables and masks as packed weights: the writer of what ``packed`` reads.

Weights come as [g, m, n] and are stored in their own shape, a row an output. ``pack_nearest`` gives a
weight that was cut the layout that it had, each value at its nearest code: what a price or an
evaluation needs at once.

Axes: g groups, m outputs and n inputs of a group, b blocks of outputs, k steps or entries.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int8, Int64
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.core.packing import FLOAT_BITS, GROUP, GROUPS_OF_BYTE, PLACES, Packing
from tersor.ops.bit_packing import pack
from tersor.ops.codebook import Codebook, CodebookScheme, first_tables, nearest_codes
from tersor.ops.group_grids import GroupGrid, Steps, fit_steps
from tersor.ops.group_grids import nearest_codes as nearest_grid_codes
from tersor.ops.packed import Packed
from tersor.ops.sparsity import NofM, Unstructured, best_mask, magnitude_scores

LARGEST_HALF = 65504.0  # of a float16, which stores steps and entries


def fits(weight: Float[Tensor, "*shape"]) -> bool:
    """Whether steps and entries of a weight are float16 numbers."""
    return not weight.numel() or float(weight.abs().amax()) < LARGEST_HALF


def grid_of(packing: Packing) -> GroupGrid:
    """The grid of a packed weight's codes: symmetric, steps of either sign in float16."""
    return GroupGrid(bits=packing.bits, group=packing.group or None)


def scheme_of(packing: Packing) -> CodebookScheme:
    """The tables of a packed weight."""
    return CodebookScheme(
        entries=2**packing.bits,
        outputs=1 if packing.per_output else 0,
        value_dtype=torch.float16,
    )


def pack_grid(packing: Packing, codes: Int8[Tensor, "g m n"], steps: Steps) -> Packed:
    """Codes on a symmetric grid.

    Args:
        packing: Of kind ``grid``.
        codes: Of ``packing.bits``; read only.
        steps: One a group of inputs, exact in float16; read only.

    Raises:
        ConfigError: Codes that do not fit the bits.
        NumericalError: A step that float16 does not hold.
    """
    rows = codes.reshape(packing.outputs, packing.inputs)
    return Packed(packing, _bytes(pack(rows, packing.bits)) + _halves(steps.step))


def pack_tables(packing: Packing, codebook: Codebook) -> Packed:
    """Codes into tables.

    Args:
        packing: Of kind ``table``.
        codebook: One block of inputs; entries exact in float16; read only.

    Raises:
        NumericalError: An entry that float16 does not hold.
    """
    signed = codebook.codes.to(torch.int16) - (1 << (packing.bits - 1))
    rows = signed.to(torch.int8).reshape(packing.outputs, packing.inputs)
    return Packed(packing, _bytes(pack(rows, packing.bits)) + _halves(codebook.tables))


def pack_sparse(
    packing: Packing,
    keep: Bool[Tensor, "g m n"],
    values: Int8[Tensor, "g m n"] | Float[Tensor, "g m n"],
    steps: Steps | None,
) -> Packed:
    """A mask and the weights that it keeps.

    Args:
        packing: Of kind ``sparse``; its ``kept`` is that of the mask.
        keep: Which weights are stored; read only.
        values: Codes, or with 32 bits the weights; read only.
        steps: One an output, exact in float16; None with 32 bits.

    Raises:
        ConfigError: Codes that do not fit the bits.
        NumericalError: A step that float16 does not hold.
    """
    flat = keep.reshape(-1)
    kept = values.reshape(-1)[flat]
    mask = _bytes(_mask_bits(flat))
    if steps is None:
        return Packed(packing, mask + _bytes(kept.to(torch.float32)))
    return Packed(packing, mask + _halves(steps.step) + _bytes(pack(kept, packing.bits)))


def pack_pairs(
    packing: Packing,
    order: Int64[Tensor, " n"],
    keep: Bool[Tensor, "g m n"],
    values: Int8[Tensor, "g m n"] | Float[Tensor, "g m n"],
    steps: Steps | None,
) -> Packed:
    """Two of every four inputs in an order.

    Args:
        packing: Of kind ``pairs``.
        order: Which input stands at each place; read only.
        keep: At most two in each four of that order, zeros elsewhere; read only.
        values: As for ``pack_sparse``; zero where ``keep`` is not.
        steps: As for ``pack_sparse``.

    Raises:
        ConfigError: Codes that do not fit the bits, or more than two of four that are kept.
        NumericalError: A step that float16 does not hold.
    """
    rows = keep.flatten(0, 1)[:, order]
    fill = [0, packing.fours * GROUP - packing.inputs]
    fours = torch.nn.functional.pad(rows, fill).reshape(-1, GROUP)
    if fours.numel() and int(fours.sum(1).max()) > len(PLACES[0]):
        raise ConfigError(
            f"pairs: found {int(fours.sum(1).max())} kept weights in a group of {GROUP}, wanted at most "
            f"{len(PLACES[0])}"
        )
    # Whole pairs: what is kept comes first, then what is not, in order.
    first = fours.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    places = first[:, : len(PLACES[0])].sort(1).values
    table = torch.zeros(GROUP, GROUP, dtype=torch.int64)
    for number, place in enumerate(PLACES):
        table[place] = number
    numbers = table[places[:, 0], places[:, 1]]
    numbers = torch.nn.functional.pad(numbers, [0, -len(numbers) % GROUPS_OF_BYTE])
    powers = torch.tensor([len(PLACES) ** i for i in range(GROUPS_OF_BYTE)])
    ways = (numbers.reshape(-1, GROUPS_OF_BYTE) * powers).sum(1).to(torch.uint8)
    flat = torch.nn.functional.pad(values.flatten(0, 1)[:, order], fill).reshape(-1, GROUP)
    kept = flat.gather(1, places).reshape(-1)
    head = order.numpy().astype(packing.order_type).tobytes() + _bytes(ways)
    if steps is None:
        return Packed(packing, head + _bytes(kept.to(torch.float32)))
    return Packed(packing, head + _halves(steps.step) + _bytes(pack(kept, packing.bits)))


def kept_of(shape: Sequence[int], zeros: float) -> int:
    """How many weights stay where a share of them are zeros."""
    return round((1 - zeros) * math.prod(shape))


def pack_nearest(weight: Float[Tensor, "g m n"], packing: Packing) -> Packed:
    """A weight in a layout, each value at its nearest code; the smallest ones are dropped.

    Args:
        weight: Of the layout's rows and inputs; read only.
        packing: Of any kind.

    Raises:
        NumericalError: The weight is not finite, or too large for float16 steps.
    """
    if packing.kind == "table":
        even = torch.ones_like(weight[:, 0], dtype=torch.float64)
        tables = first_tables(weight, even, scheme_of(packing))[0]
        tables = tables.half().double()
        return pack_tables(packing, Codebook(codes=nearest_codes(weight, tables), tables=tables))
    grid = grid_of(packing) if packing.bits != FLOAT_BITS else None
    if packing.kind == "grid":
        assert grid is not None
        fitted = fit_steps(weight, grid)
        return pack_grid(packing, nearest_grid_codes(weight, fitted, grid), fitted)
    order = torch.arange(packing.inputs)
    if packing.kind == "pairs":
        fill = [0, -packing.inputs % GROUP]
        scores = torch.nn.functional.pad(magnitude_scores(weight), fill)
        keep = best_mask(scores, NofM(kept=2, of=GROUP))[:, :, : packing.inputs]
    else:
        share = packing.kept / max(1, weight.numel())
        keep = best_mask(magnitude_scores(weight), Unstructured(kept=share))
    rest: Tensor = weight * keep
    steps: Steps | None = None
    if grid is not None:
        steps = fit_steps(rest, grid)
        rest = nearest_grid_codes(rest, steps, grid)
    if packing.kind == "pairs":
        return pack_pairs(packing, order, keep, rest, steps)
    return pack_sparse(packing, keep, rest, steps)


def _mask_bits(flat: Bool[Tensor, " n"]) -> Tensor:
    padded = torch.nn.functional.pad(flat.to(torch.uint8), [0, -len(flat) % 8]).reshape(-1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.int16)
    bits: Tensor = (padded.to(torch.int16) * powers).sum(1).to(torch.uint8)
    return bits


def _halves(values: Float64[Tensor, "*shape"]) -> bytes:
    stored = values.to(torch.float16)
    if not torch.equal(stored.to(torch.float64), values.to(torch.float64)):
        raise NumericalError(
            "found a step or an entry that float16 does not hold; fit them with that type"
        )
    return _bytes(stored)


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().numpy().tobytes()
    return data
