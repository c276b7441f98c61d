"""Launches of ``codebook_linear`` that are worth measuring for a number of rows and a kind of weight."""

from typing import Literal, NamedTuple

import torch
import triton

from tersor.kernels.codebook_kernels_triton import ARITHMETIC, LOAD, PERMUTE
from tersor.kernels.codebook_mma_triton import SAMPLES, TILE

Form = Literal["vector", "dot", "mma", "dense"]


class Launch(NamedTuple):
    """How a call is computed.

    Attributes:
        form: One row of x by threads ("vector"), any number of rows by tensor cores as the compiler uses
            them ("dot"), few rows by their instructions ("mma"), or an expanded weight ("dense").
        lookup: Of ``codebook_kernels_triton``.
        outputs: Of a program.
        width: Of a program's tile: words of a row ("vector"), or rows of x ("dot", "mma").
        splits: Programs that share the inputs.
        warps: Of 32 threads.
        stages: Of loads in flight that the compiler makes of a loop ("dot"); steps by which what is read is
            loaded before it is used, 0 or 1 ("mma").
        joined: Places of a word that are one product of tensor cores ("dot"), 1, 2 or 4.
        tall: Tiles of 16 outputs of a warp ("mma"): warps beyond those that a program's outputs take share
            the inputs.
    """

    form: Form
    lookup: int
    outputs: int = 32
    width: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 1
    joined: int = 1
    tall: int = 1

    @property
    def deep(self) -> int:
        """Warps that share the inputs ("mma")."""
        return self.warps * TILE * self.tall // self.outputs


# Outputs, words, splits, warps. A thread has two or four rows, so that an input is converted once for as many
# products; fewer words than threads: the compiler would hand x around through shared memory otherwise, with
# a barrier for every place. The last two have 512 threads.
_VECTORS = (
    (32, 64, 2, 4), (32, 64, 4, 4), (32, 64, 1, 4), (32, 128, 2, 8), (32, 128, 2, 16), (32, 128, 4, 16),
)  # fmt: skip
# Outputs, splits, warps, stages; the last has 512 threads.
_DOTS = (
    (64, 4, 4, 3), (128, 4, 8, 3), (64, 2, 4, 3), (128, 2, 8, 3), (128, 4, 4, 3), (128, 8, 8, 3), (256, 8, 16, 3),
)  # fmt: skip
# With four places a product, which are most of the waiting: of up to 16 rows, and of more.
_JOINED = 4
_JOINED_DOTS = ((128, 4, 8, 3), (64, 4, 4, 3), (128, 2, 8, 3), (256, 4, 8, 3))
_WIDE_JOINED_DOTS = ((128, 2, 8, 3), (64, 2, 4, 2), (128, 4, 8, 2), (64, 4, 4, 2), (128, 1, 8, 3))
_TALL_DOTS = ((64, 1, 4, 3), (128, 1, 4, 3), (128, 1, 8, 3), (128, 2, 8, 3))
# Outputs, splits, warps, steps ahead, tiles of a warp: the fastest of some 80 on an H200; of tables
# those with the fewest registers are.
_MMAS = (
    (16, 1, 4, 1, 1), (64, 8, 2, 0, 2), (32, 1, 8, 1, 1), (64, 8, 2, 1, 2), (128, 8, 4, 0, 2), (64, 4, 4, 1, 1),
)  # fmt: skip
_TABLE_MMAS = ((16, 1, 4, 0, 1), (32, 1, 8, 0, 1), (64, 1, 16, 0, 1))
_LESS = 2  # tiles that are tried with a lookup of which less is to be expected
FEW = 64  # rows of x up to which one program takes all of them
_MMA_ROWS = (
    8  # of x up to which "mma" is tried: with 16 it takes a third more than "dot" on an H200
)
_MMA_TYPES = (torch.bfloat16, torch.float16)
_MMA_INPUTS = 4  # of a row of x that a thread loads at once
_LEAST_ROWS = 16  # of x in a program, of which tensor cores take 8 or 16 at once


class Facts(NamedTuple):
    """What a weight is, beside its sizes."""

    bits: int
    is_uniform: bool
    has_planes: bool
    is_grouped: bool  # its tables


def lookups(facts: Facts) -> tuple[int, ...]:
    """The ways from a code to its value, the one to expect most of first."""
    if facts.is_uniform:
        return (ARITHMETIC,)
    return (PERMUTE, LOAD) if facts.has_planes else (LOAD,)


def launches(rows: int, facts: Facts) -> tuple[Launch, ...]:
    """What is worth measuring for a number of rows of x, the one to expect most of first."""
    found: list[Launch] = []
    width = max(_LEAST_ROWS, min(FEW, triton.next_power_of_2(rows)))
    vectors, dots = _VECTORS if rows == 1 else (), _DOTS if rows <= FEW else _TALL_DOTS
    for i, lookup in enumerate(lookups(facts)):
        last = None if i == 0 else _LESS
        found += [Launch("vector", lookup, n, w, s, warps) for n, w, s, warps in vectors[:last]]
        found += [
            Launch("dot", lookup, n, width, s, warps, deep) for n, s, warps, deep in dots[:last]
        ]
        joined = _JOINED_DOTS if width == _LEAST_ROWS else _WIDE_JOINED_DOTS
        found += [
            Launch("dot", lookup, n, width, s, warps, deep, _JOINED)
            for n, s, warps, deep in joined[:last]
        ]
    if rows > FEW:
        found.append(Launch("dense", lookups(facts)[-1]))
    return tuple(found)


def mma_launches(rows: int, inputs: int, dtype: torch.dtype, facts: Facts) -> tuple[Launch, ...]:
    """What is worth measuring of "mma": none for many rows, float32, or rows that 8 bytes do not divide."""
    if rows > _MMA_ROWS or dtype not in _MMA_TYPES or inputs % _MMA_INPUTS:
        return ()
    width = max(SAMPLES, triton.next_power_of_2(rows))
    lookup = lookups(facts)[0]
    tiles = _MMAS if lookup == ARITHMETIC else _TABLE_MMAS
    return tuple(
        Launch("mma", lookup, n, width, s, warps, ahead, tall=tall)
        for n, s, warps, ahead, tall in tiles
    )
