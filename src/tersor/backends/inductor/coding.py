"""Linears whose weights stay codes: ``kernels.codebook_linear`` in place of products with their floats.

A packed weight is there as the floats that it stands for, and the graph knows its bits beside them; an
integer weight that its op reads through a dequantiser has its codes in the graph. Either is read as codes
where the kernel has its layout: tables and grids of linears, groups of a multiple of 32 inputs. Other
packed weights (sparse ones, embeddings, convolutions) stay floats.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from tersor.core.packing import Packing
from tersor.kernels.codebook_linear import codebook_linear
from tersor.kernels.codebook_weight import WORD, CodedWeight, coded_weight
from tersor.ops.packed import Packed

_LINEAR = torch.ops.aten.linear.default
_INTEGERS = torch.ops.quantized_decomposed.dequantize_per_channel.default
_FEW, _MANY = 4, 8  # bits of a code in the kernel


def code_linears(
    graph: fx.Graph, tensors: dict[str, Tensor], packed: Mapping[str, Packed]
) -> dict[str, str]:
    """Let linears read codes.

    Args:
        graph: Changed in place.
        tensors: Of the graph; gets words, tables and scales, which keep their types.
        packed: Tensor -> its bits.

    Returns:
        New node -> the node whose place it took.
    """
    sources: dict[str, str] = {}
    known: dict[str, tuple[Any, ...]] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _LINEAR:
            continue
        weight = node.args[1]
        if weight.name not in known:
            coded = _coded(weight, tensors, packed)
            if coded is None:
                continue
            known[weight.name] = _stored(coded, str(weight.name), tensors)
        *names, bits, inputs, group = known[weight.name]
        bias = node.args[2] if len(node.args) > 2 else None
        with graph.inserting_before(node):
            parts = [None if name is None else graph.get_attr(name) for name in names]
            found = graph.call_function(
                codebook_linear, (node.args[0], *parts, bias, bits, inputs, group)
            )
        sources[found.name] = node.name
        node.replace_all_uses_with(found)
        graph.erase_node(node)
    return sources


def own_tensors(name: str) -> bool:
    """Whether a tensor is one that ``code_linears`` added."""
    return name.startswith(_PREFIX)


_PREFIX = "tersor_coded_"


def _stored(coded: CodedWeight, name: str, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """Names of the tensors of a weight, and its numbers, in the op's order."""
    names: list[str | None] = []
    for part in ("words", "tables", "planes", "scales"):
        tensor = getattr(coded, part)
        names.append(None if tensor is None else f"{_PREFIX}{name}_{part}")
        if tensor is not None:
            tensors[str(names[-1])] = tensor
    return (*names, coded.bits, coded.inputs, coded.group)


def _coded(
    weight: fx.Node, tensors: Mapping[str, Tensor], packed: Mapping[str, Packed]
) -> CodedWeight | None:
    if weight.op == "get_attr":
        return _of_bits(packed.get(str(weight.target)))
    if weight.op != "call_function" or weight.target is not _INTEGERS:
        return None
    codes, steps, zeros, axis = weight.args[:4]
    values, scale = (tensors.get(str(getattr(v, "target", ""))) for v in (codes, steps))
    if zeros is not None or axis != 0 or values is None or scale is None:
        return None
    if values.dtype != torch.int8 or values.dim() != 2:
        return None
    unsigned = values.to(torch.int16) + (1 << (_MANY - 1))
    return coded_weight(unsigned, bits=_MANY, scales=scale.reshape(-1, 1))


def _of_bits(packed: Packed | None) -> CodedWeight | None:
    return None if packed is None or not _fits(packed.packing) else coded_of(packed)


def _fits(packing: Packing) -> bool:
    """Whether the kernel has a layout."""
    is_whole = packing.group % WORD == 0 or packing.steps == 1
    return packing.kind in ("grid", "table") and len(packing.shape) == 2 and is_whole


def coded_of(packed: Packed) -> CodedWeight:
    """A packed weight [outputs, inputs] as the kernel reads it; the same values to the last bit.

    Args:
        packed: A table, or a grid whose groups are a multiple of 32 inputs, or one.

    Raises:
        ConfigError: Another kind.
        ShapeError: Other groups.
    """
    packing = packed.packing
    found, values = (torch.from_numpy(part.copy()) for part in packed.coded())
    if packing.kind == "table":
        return coded_weight(found, bits=packing.bits, tables=values.unsqueeze(1))
    bits = _FEW if packing.bits <= _FEW else _MANY
    # The kernel's zero is in the middle of its own codes.
    codes = found.to(torch.int16) + ((1 << (bits - 1)) - (1 << (packing.bits - 1)))
    group = packing.group if packing.steps > 1 else 0
    return coded_weight(codes, bits=bits, scales=values, group=group)
