"""``codebook_linear`` on a CUDA device: which kernel, tile and lookup a shape gets, and the calls.

What is fastest depends on the card and the shape, so that it is measured when a call is first made outside
of a compiler (``tiles``), on copies of the weight that do not fit the second-level cache: a model reads
every weight once a step, and what a cached weight would like best is another tile. For many rows, whose
product costs more than its bytes, "dense" expands the weight and leaves the product to torch; it is only
one of the choices, too.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton import knobs
from triton.runtime.errors import OutOfResources

from tersor.kernels.codebook_kernels_triton import (
    GROUP_SCALE,
    NO_SCALE,
    ROW_SCALE,
    codebook_dot_kernel,
    codebook_expand_kernel,
    codebook_sum_kernel,
    codebook_vector_kernel,
)
from tersor.kernels.codebook_launches import (
    FEW,
    Facts,
    Launch,
    launches,
    lookups,
    mma_launches,
)
from tersor.kernels.codebook_mma_triton import codebook_mma_kernel
from tersor.kernels.codebook_weight import WORD, codebook_linear_reference
from tersor.kernels.tiles import Chosen, choose, is_exact, is_real, result, take_near

# What two launches may differ by, as a share of the result's norm: some roundings of bfloat16. Operands in
# another order than the instruction takes them in are off by the norm itself.
_AGREEMENT = 2.0**-6
_FLOAT32_STAGES = 2  # 1 and 2 compute what they should on an H200
_ADDED = 256  # outputs of a program that adds parts
_EXPANDED = 16  # rows of a program that expands a weight
# Weights that are read in turn take this many times the second-level cache.
_COLD = 4
_KERNELS = {"dot": codebook_dot_kernel, "mma": codebook_mma_kernel}
# The interpreter that tests on CPUs use knows no assembly.
_NATIVE = not knobs.runtime.interpret
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Launch] = Chosen()


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
    steps = -(-weight.words.shape[1] // _tile_words(launch))
    each = -(-steps // launch.splits)
    splits = -(-steps // each)
    target = y if splits == 1 else x.new_empty(splits, x.shape[0], out, dtype=torch.float32)
    own_bias = bias if splits == 1 else None
    settings = {
        **_settings(weight, launch.lookup), "RUN": _run(weight), "BIAS": own_bias is not None,
    }  # fmt: skip
    if launch.form == "dot":
        settings["JOINED"] = math.gcd(launch.joined, settings["RUN"])
    if launch.form == "mma":
        x, weight = _aligned(x), weight._replace(words=_aligned(weight.words))
        settings |= {
            "TALL": launch.tall, "WARPS": launch.warps, "AHEAD": launch.stages,
            "WHOLE": _is_whole(weight, each * splits * launch.deep),
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
        kernel = wrap_triton(_tiled(_KERNELS[launch.form], _staged(launch, x.dtype)))
        kernel[blocks * triton.cdiv(x.shape[0], launch.width), splits](
            *tensors, x.shape[0], *sizes, *counts, **settings
        )
    if splits > 1:
        _add(target, bias, y)
    return y


def _tile_words(launch: Launch) -> int:
    """Words of a row that a program takes at once."""
    if launch.form == "vector":
        return launch.width
    return WORD * launch.deep if launch.form == "mma" else WORD


def _staged(launch: Launch, dtype: torch.dtype) -> Launch:
    """With the compiler's stages that are right: with 4 of float32 Triton 3.6 reads words that are off."""
    if launch.form == "dot" and dtype == torch.float32:
        return launch._replace(stages=min(launch.stages, _FLOAT32_STAGES))
    return launch


def _is_whole(weight: Weight, chunks: int) -> bool:
    """Whether the inputs are exactly so many chunks."""
    return weight.inputs == chunks * WORD * (WORD // weight.bits)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it begins within the 16 bytes that a thread may load at once."""
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % 16 else tensor


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
        num_stages=1 if launch.form == "mma" else launch.stages,
    )
    return triton.autotune([config], key=[])(kernel)


def _key(x: Tensor, weight: Weight) -> _Key:
    sizes = (*x.shape, *weight.words.shape, _groups(weight), *weight.facts)
    return (*sizes, x.dtype, str(x.device))


def launch_of(x: Tensor, weight: Weight) -> Launch:
    """How a call is computed: as was chosen for its shape, or else as is to be expected."""
    rows: Any = x.shape[0]
    if not isinstance(rows, int):  # open: any number of rows
        return launches(FEW + 1, weight.facts)[0]
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
    call = partial(codebook_linear_op, x, words, tables, planes, scales, bias, bits, inputs, group)
    if not is_real(x) or not x.shape[0]:
        found: Tensor = call()
        return found
    key, is_measured = _key(x, weight), False
    is_known = key in _CHOSEN and not (is_exact() and key in _CHOSEN.taken)
    if not is_known and not take_near(_CHOSEN, key, _known(x, weight)):
        turns = _in_turn(cycle(_copies(words)), x, weight, bias)
        is_measured = choose(_CHOSEN, key, _candidates(x, weight), turns)
    return result(call, is_measured=is_measured)


def _known(x: Tensor, weight: Weight) -> tuple[Launch, ...]:
    """All launches of a call, whether or not they agree on this device."""
    rows, facts = x.shape[0], weight.facts
    return (*launches(rows, facts), *mma_launches(rows, weight.inputs, x.dtype, facts))


def _candidates(x: Tensor, weight: Weight) -> tuple[Launch, ...]:
    """What to choose from: what agrees with the expanded weight's product on this device.

    No compiler checks in which order "mma" takes its operands, and one was seen that let registers be written
    while a product of "dot" still read them.

    Warns:
        RuntimeWarning: A launch does not agree, and is left out.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    probe = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    dense = Launch("dense", lookups(weight.facts)[-1])
    try:
        wanted = run(probe, weight, None, dense).float()
    except torch.OutOfMemoryError:  # nothing to compare with
        return launches(x.shape[0], weight.facts)
    most = _AGREEMENT * float(wanted.norm())
    found = []
    for launch in _known(x, weight):
        try:
            off = float((run(probe, weight, None, launch).float() - wanted).norm())
        except OutOfResources:  # which the choice finds out as well
            off = 0.0
        if off <= most:
            found.append(launch)
        else:
            warnings.warn(
                f"codebook linear of {tuple(x.shape)} and {weight.facts}: {launch} is off by {off:.3g} "
                f"from the expanded weight's product, at most {most:.3g} was wanted; it is left out",
                RuntimeWarning,
                stacklevel=2,
            )
    return tuple(found) or (dense,)


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
