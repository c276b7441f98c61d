"""The float graph behind a quantised one, for its sizes: same nodes, same names, no quantisers."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from tersor.core.records import Format, Precision
from tersor.graph import meta
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.split import split

_decomposed = torch.ops.quantized_decomposed
_DEQUANTIZED_WEIGHT = _decomposed.dequantize_per_channel.default
_DEQUANTIZED = _decomposed.dequantize_per_tensor.default
_CODES = "_codes"  # behind a weight's name: what ``apply`` stores in its place
_QUANTIZED = _decomposed.quantize_per_tensor.default


def plain(graph: Graph) -> Graph:
    """The graph without quantisers; values of weights that were codes are zeros, sizes are right."""
    fresh, tensors = copy_graph(graph.module)
    for node in list(fresh.nodes):
        if node.target is _DEQUANTIZED_WEIGHT:
            _replace_weight(fresh, node, tensors)
        elif node.target is _DEQUANTIZED and _is_quantizer(node.args[0]):
            node.replace_all_uses_with(node.args[0].args[0])
    for node in fresh.nodes:
        node.meta.pop("val", None)
    found = replace(graph, module=rebuild(fresh, tensors), packed={})
    meta.ensure(found)
    return found


def _is_quantizer(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target is _QUANTIZED


def _replace_weight(graph: fx.Graph, node: fx.Node, tensors: dict[str, Tensor]) -> None:
    codes = node.args[0]
    if not isinstance(codes, fx.Node) or codes.op != "get_attr":
        return
    name = str(codes.target).removesuffix(_CODES)
    tensors[name] = torch.zeros(1).expand(tensors[str(codes.target)].shape)
    with graph.inserting_before(node):
        stored = graph.create_node("get_attr", name)
    node.replace_all_uses_with(stored)


def formats_of(graph: Graph, precision: Precision) -> Mapping[str, Format]:
    """The format in which each layer computes: int8 where weight and input are integers."""
    found: dict[str, Format] = {}
    for operation in split(graph.module).operations:
        rounds = operation.weight.scale is not None and operation.activation is not None
        found[operation.name] = "int8" if rounds else precision
    return found
