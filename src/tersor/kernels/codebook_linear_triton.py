"""``codebook_linear`` on a CUDA device: which kernel, tile and lookup a shape gets, and the calls.

What is fastest depends on the card and the shape, so that it is measured when a call is first made outside
of a compiler (``tiles``), on copies of the weight that do not fit the second-level cache: a model reads
every weight once a step, and what a cached weight would like best is another tile. For many rows, whose
product costs more than its bytes, "dense" expands the weight and leaves the product to torch; it is only
one of the choices, too.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton import knobs

from tersor.kernels.codebook_kernels_triton import (
    ARITHMETIC,
    GROUP_SCALE,
    LOAD,
    NO_SCALE,
    PERMUTE,
    ROW_SCALE,
    codebook_dot_kernel,
    codebook_expand_kernel,
    codebook_sum_kernel,
    codebook_vector_kernel,
)
from tersor.kernels.codebook_weight import WORD, codebook_linear_reference
from tersor.kernels.tiles import choose, is_real

Form = Literal["vector", "dot", "dense"]


class Launch(NamedTuple):
    """How a call is computed.

    Attributes:
        form: One row of x by threads, any number of rows by tensor cores, or an expanded weight.
        lookup: Of ``codebook_kernels_triton``.
        outputs: Of a program.
        width: Of a program's tile: words of a row ("vector"), or rows of x ("dot").
        splits: Programs that share the inputs.
        warps: Of 32 threads.
        stages: Of loads in flight that the compiler makes of a loop ("dot").
    """

    form: Form
    lookup: int
    outputs: int = 32
    width: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 1


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
_TALL_DOTS = ((64, 1, 4, 3), (128, 1, 4, 3), (128, 1, 8, 3), (128, 2, 8, 3))
_LESS = 2  # tiles that are tried with a lookup of which less is to be expected
_FEW = 64  # rows of x up to which one program takes all of them
_FLOAT32_STAGES = 2  # 1 and 2 compute what they should on an H200
_LEAST_ROWS = 16  # of x in a program, of which tensor cores take 8 or 16 at once
_ADDED = 256  # outputs of a program that adds parts
_EXPANDED = 16  # rows of a program that expands a weight
# Weights that are read in turn take this many times the second-level cache.
_COLD = 4
# The interpreter that tests on CPUs use knows no assembly.
_NATIVE = not knobs.runtime.interpret
_Key = tuple[Any, ...]
_CHOSEN: dict[_Key, Launch] = {}


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
    width = max(_LEAST_ROWS, min(_FEW, triton.next_power_of_2(rows)))
    vectors, dots = _VECTORS if rows == 1 else (), _DOTS if rows <= _FEW else _TALL_DOTS
    for i, lookup in enumerate(lookups(facts)):
        last = None if i == 0 else _LESS
        found += [Launch("vector", lookup, n, w, s, warps) for n, w, s, warps in vectors[:last]]
        found += [
            Launch("dot", lookup, n, width, s, warps, deep) for n, s, warps, deep in dots[:last]
        ]
    if rows > _FEW:
        found.append(Launch("dense", lookups(facts)[-1]))
    return tuple(found)


class Weight(NamedTuple):
    """The arguments of the op that are its weight; see ``codebook_weight.CodedWeight``."""

    words: Tensor
    tables: Tensor | None
    planes: Tensor | None
    scales: Tensor | None
    bits: int
    inputs: int
    group: int

    @property
    def facts(self) -> Facts:
        """What decides how it is read."""
        is_grouped = self.tables is not None and self.tables.shape[1] > 1
        return Facts(self.bits, self.tables is None, self.planes is not None, is_grouped)


def run(x: Tensor, weight: Weight, bias: Tensor | None, launch: Launch) -> Tensor:
    """The product of [rows, inp] as a launch has it.

    Args:
        x: Contiguous.
        weight: On the same device.
        bias: [out] or None.
        launch: One of ``launches`` for a weight like this; "vector" takes one row.
    """
    out = weight.words.shape[0]
    y = x.new_empty(x.shape[0], out)
    if launch.form == "dense":
        return _dense(x, weight, bias, launch)
    if isinstance(x.shape[0], int) and not x.shape[0]:
        return y
    # Chunks for each split, in steps of a tile; splits that would have no work are left out.
    tile = launch.width if launch.form == "vector" else WORD
    steps = -(-weight.words.shape[1] // tile)
    each = -(-steps // launch.splits)
    splits = -(-steps // each)
    target = y if splits == 1 else x.new_empty(splits, x.shape[0], out, dtype=torch.float32)
    own_bias = bias if splits == 1 else None
    settings = {
        **_settings(weight, launch.lookup), "RUN": _run(weight), "BIAS": own_bias is not None,
    }  # fmt: skip
    tensors = (x, *_present(weight), weight.words if own_bias is None else own_bias, target)
    planes = 0 if weight.planes is None or weight.planes.shape[0] == 1 else weight.planes.shape[1]
    sizes = (out, weight.inputs, weight.words.shape[1], _table_stride(weight), planes)
    counts = (_groups(weight), each)
    blocks = triton.cdiv(out, launch.outputs)
    if launch.form == "vector":
        kernel = wrap_triton(_tiled(codebook_vector_kernel, launch))
        kernel[blocks, splits](*tensors, *sizes, *counts, **settings)
    else:
        if (
            x.dtype == torch.float32
        ):  # with 4 stages Triton 3.6 reads words at addresses that are off
            launch = launch._replace(stages=min(launch.stages, _FLOAT32_STAGES))
        kernel = wrap_triton(_tiled(codebook_dot_kernel, launch))
        kernel[blocks * triton.cdiv(x.shape[0], launch.width), splits](
            *tensors, x.shape[0], *sizes, *counts, **settings
        )
    if splits > 1:
        _add(target, bias, y)
    return y


def _add(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    splits, rows, out = parts.shape
    wrap_triton(codebook_sum_kernel)[rows, triton.cdiv(out, _ADDED)](
        parts, parts if bias is None else bias, y, rows, out,
        SPLITS=splits, BIAS=bias is not None, BN=_ADDED,
    )  # fmt: skip


def _dense(x: Tensor, weight: Weight, bias: Tensor | None, launch: Launch) -> Tensor:
    out, width = weight.words.shape
    dense = x.new_empty(out, weight.inputs)
    words, tables, _, scales = _present(weight)
    wrap_triton(codebook_expand_kernel)[(triton.cdiv(out, _EXPANDED) * (width // WORD),)](
        words, tables, scales, dense, out, weight.inputs, width,
        _table_stride(weight), _groups(weight),
        **_settings(weight, launch.lookup), BN=_EXPANDED,
    )  # fmt: skip
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _present(weight: Weight) -> tuple[Tensor, ...]:
    """Words, tables, planes, scales; what there is not is a pointer that the kernel does not read."""
    words = weight.words
    return (words, *(words if t is None else t for t in weight[1:4]))


def _settings(weight: Weight, lookup: int) -> dict[str, Any]:
    scale = NO_SCALE
    if weight.scales is not None:
        scale = GROUP_SCALE if weight.scales.shape[1] > 1 else ROW_SCALE
    grouped = weight.facts.is_grouped
    group = weight.group if _groups(weight) > 1 else WORD  # of one group the size does not count
    return {
        "GROUP": group, "BITS": weight.bits, "LOOKUP": lookup, "SCALE": scale, "GROUPED": grouped,
        "NATIVE": _NATIVE,
    }  # fmt: skip


def _table_stride(weight: Weight) -> int:
    tables = weight.tables
    if tables is None or tables.shape[0] == 1:
        return 0
    return tables.shape[1] * tables.shape[2]


def _groups(weight: Weight) -> int:
    return max(1 if t is None else t.shape[1] for t in (weight.tables, weight.scales))


def _run(weight: Weight) -> int:
    """Places of a word that share a group: as many runs of 32 inputs as fit a group evenly."""
    places = WORD // weight.bits
    return places if _groups(weight) == 1 else math.gcd(places, weight.group // WORD)


@cache
def _tiled(kernel: Any, launch: Launch) -> Any:
    """The kernel with one tile: a list of one, so that no compiler has anything to tune."""
    width = "BW" if launch.form == "vector" else "BM"
    config = triton.Config(
        {"BN": launch.outputs, width: launch.width},
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return triton.autotune([config], key=[])(kernel)


def _key(x: Tensor, weight: Weight) -> _Key:
    sizes = (*x.shape, *weight.words.shape, _groups(weight), *weight.facts)
    return (*sizes, x.dtype, str(x.device))


def launch_of(x: Tensor, weight: Weight) -> Launch:
    """How a call is computed: as was chosen for its shape, or else as is to be expected."""
    rows: Any = x.shape[0]
    if not isinstance(rows, int):  # open: any number of rows
        return launches(_FEW + 1, weight.facts)[0]
    return _CHOSEN.get(_key(x, weight), launches(rows, weight.facts)[0])


@triton_op("tersor::codebook_linear", mutates_args={})
def codebook_linear_op(
    x: Tensor,
    words: Tensor,
    tables: Tensor | None,
    planes: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    bits: int,
    inputs: int,
    group: int,
) -> Tensor:
    """[rows, inp] -> [rows, out]; on other devices than CUDA the reference."""
    if not x.is_cuda:
        return codebook_linear_reference(
            x, words, tables, planes, scales, bias, bits, inputs, group
        )
    weight = Weight(words, tables, planes, scales, bits, inputs, group)
    return run(x, weight, bias, launch_of(x, weight))


def codebook_linear_cuda(
    x: Tensor,
    words: Tensor,
    tables: Tensor | None,
    planes: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    bits: int,
    inputs: int,
    group: int,
) -> Tensor:
    """As ``codebook_linear.codebook_linear``, of [rows, inp], by the kernels."""
    x = x.contiguous()
    weight = Weight(words, tables, planes, scales, bits, inputs, group)
    if is_real(x) and x.shape[0]:
        turns = cycle(_copies(words) if _key(x, weight) not in _CHOSEN else (words,))
        choose(
            _CHOSEN,
            _key(x, weight),
            launches(x.shape[0], weight.facts),
            _in_turn(turns, x, weight, bias),
        )
    found: Tensor = codebook_linear_op(x, words, tables, planes, scales, bias, bits, inputs, group)
    return found


def _in_turn(
    turns: "cycle[Tensor]", x: Tensor, weight: Weight, bias: Tensor | None
) -> Callable[[], object]:
    def call() -> object:
        other = weight._replace(words=next(turns))
        return codebook_linear_op(
            x, other.words, other.tables, other.planes, other.scales, bias, *other[4:]
        )

    return call


def _copies(words: Tensor) -> Sequence[Tensor]:
    """As many copies of a weight as its cache can't hold; itself alone where memory is short."""
    cached = torch.cuda.get_device_properties(words.device).L2_cache_size
    count = min(64, -(-_COLD * cached // max(1, words.numel() * words.element_size())))
    try:
        return [words, *(words.clone() for _ in range(count - 1))]
    except torch.OutOfMemoryError:
        return [words]
