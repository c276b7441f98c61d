"""The only place that edits a graph: changes at sites become nodes and tensors.

An int8 op reads ``quantize -> dequantize`` of its tensor (one pair for all readers, with the
channel scaling and the shift before it) and ``dequantize_per_channel`` of its integer weight; of 8-bit floats see ``graph.float8``. An
int8 addition reads such pairs of its operands, in the tensors' own units again. A packed weight is
there as the floats that it stands for; the graph knows its bits beside them. A layer with factors
becomes a chain of ops, of which the last one keeps its node's name (``graph.factors``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from tersor.core.errors import ShapeError
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import copy_graph, parameters_by_name, rebuild
from tersor.graph.factors import insert_chain
from tersor.graph.float8 import SUFFIX, write_read, write_weight
from tersor.graph.operators import WeightedOp, Window, weighted_op
from tersor.ops.float8 import FLOAT8

aten = torch.ops.aten

_INT8_LIMIT = 127
NEW = "_new"  # behind the name of a weight in whose place other floats are


def apply(graph: Graph, changes: Sequence[SiteChange]) -> Graph:
    """A new graph with the changes in effect; tensors that stay are shared, not copied.

    Args:
        graph: Normalised, without quantisers at the changed sites.
        changes: At most one a site. Changes that read one tensor must carry equal quantisers.

    Raises:
        ShapeError: A change whose codes or bias do not fit the site's weight.
    """
    fresh, tensors = copy_graph(graph.module)
    nodes = {node.name: node for node in fresh.nodes}
    pairs = _Pairs(fresh, tensors, {})
    weights: dict[str, fx.Node | None] = {}
    packed = dict(graph.packed)
    position = {name: i for i, name in enumerate(nodes)}
    _replace_functions(fresh, tensors, nodes, changes)
    # In graph order, so that a tensor's quantiser stands before its first reader.
    others = [change for change in changes if change.site.op_kind != "activation"]
    work = [(position[name], name, change) for change in others for name in change.site.ops]
    for _, name, change in sorted(work, key=lambda item: item[0]):
        if change.site.op_kind == "add":
            pairs.read_by_add(nodes[name], change)
            continue
        op = weighted_op(nodes[name], tensors)
        if op is None:
            raise ShapeError(f"{change.site.name}: node {name} has no stored weight")
        if change.factors:
            pairs.read_by_chain(insert_chain(fresh, tensors, op, change), change)
            continue
        site = change.site.name
        if site not in weights:
            weights[site] = new = _new_weight(fresh, tensors, op, change)
            if new is not None and change.packed is not None:
                packed[str(new.target)] = change.packed
        _connect(fresh, tensors, op, change, weights[site])
        if change.quantizer is not None:
            pairs.read(op.node, change.quantizer, op.window)
    fresh.lint()
    module = rebuild(fresh, tensors)
    held = parameters_by_name(module)
    return replace(graph, module=module, packed={n: p for n, p in packed.items() if n in held})


def _replace_functions(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    nodes: Mapping[str, fx.Node],
    changes: Sequence[SiteChange],
) -> None:
    """Activations first: whatever else reads them finds them under their names."""
    layers = [change for change in changes if change.site.has_weight]
    taken = frozenset(name for change in layers for name in change.site.ops)
    for change in changes:
        if change.site.op_kind == "activation":
            _replace_function(graph, tensors, nodes[change.site.ops[0]], change, taken)


def _replace_function(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    node: fx.Node,
    change: SiteChange,
    taken: frozenset[str],
) -> None:
    """A cheaper function s(a x) / a under the activation's name, and its reader's weight for it.

    Args:
        graph: Changed in place.
        tensors: Of the graph; gets the new ones.
        node: The activation.
        change: Its level, factor and, where it has them, the reader's weight and bias.
        taken: Ops whose weight another change decides: those keep it.
    """
    (reader,) = node.users
    x = node.args[0]
    function = {"hardswish": aten.hardswish.default, "relu": aten.relu.default}[str(change.level)]
    is_scaled = change.level != "relu" and change.factor != 1
    if is_scaled:
        with graph.inserting_before(node):
            scaled = graph.create_node(
                "call_function", aten.mul.Tensor, (x, change.factor), name=f"{node.name}_in"
            )
            inner = graph.create_node("call_function", function, (scaled,), name=f"{node.name}_s")
        node.target, node.args = aten.mul.Tensor, (inner, 1 / change.factor)
    else:
        node.target, node.args = function, (x,)
    node.kwargs = {}
    op = weighted_op(reader, tensors)
    if op is not None and reader.name not in taken and change.weight is not None:
        _connect(graph, tensors, op, change, _new_weight(graph, tensors, op, change))


def quantize_node_name(tensor: str) -> str:
    """The name of the node that quantises a tensor: pricing looks it up."""
    return f"{tensor}_quantize"


def _new_weight(
    graph: fx.Graph, tensors: dict[str, Tensor], op: WeightedOp, change: SiteChange
) -> fx.Node | None:
    old = tensors[str(op.weight.target)]
    base = str(op.weight.target)
    if change.codes is not None:
        if change.codes.shape != old.shape or change.scale is None:
            raise ShapeError(
                f"{change.site.name}: codes {tuple(change.codes.shape)} for a weight "
                f"{tuple(old.shape)}; wanted the same shape and one scale a row"
            )
        if change.codes.dtype == FLOAT8:
            with graph.inserting_before(op.node):
                return write_weight(graph, tensors, op.weight, change.codes, change.scale)
        tensors[f"{base}_codes"] = change.codes.to(torch.int8)
        tensors[f"{base}_scale"] = change.scale.to(torch.float32)
        with graph.inserting_before(op.node):
            codes = graph.create_node("get_attr", f"{base}_codes", name=f"{op.weight.name}_codes")
            scale = graph.create_node("get_attr", f"{base}_scale", name=f"{op.weight.name}_scale")
            return graph.create_node(
                "call_function",
                torch.ops.quantized_decomposed.dequantize_per_channel.default,
                (codes, scale, None, 0, -_INT8_LIMIT, _INT8_LIMIT, torch.int8),
                name=f"{op.weight.name}_dequantize",
            )
    weight = change.float_weight()
    if weight is not None:
        if weight.shape != old.shape:
            raise ShapeError(
                f"{change.site.name}: weight {tuple(weight.shape)}, wanted {tuple(old.shape)}"
            )
        tensors[base + NEW] = weight.to(old.dtype)
        with graph.inserting_before(op.node):
            return graph.create_node("get_attr", base + NEW, name=op.weight.name + NEW)
    return None


def _connect(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    op: WeightedOp,
    change: SiteChange,
    weight: fx.Node | None,
) -> None:
    args = list(op.node.args)
    if weight is not None:
        args[0 if op.kind == "embedding" else 1] = weight
    if change.bias is not None and op.kind != "embedding":
        target = str(op.weight.target)
        base = target.removesuffix(".weight")
        name = f"{base}{'_' if base == target else '.'}bias_{change.level}"
        tensors[name] = change.bias.to(tensors[str(op.weight.target)].dtype)
        with graph.inserting_before(op.node):
            bias = graph.create_node("get_attr", name, name=f"{op.node.name}_bias_{change.level}")
        args = [*args, None] if len(args) == 2 else args
        args[2] = bias
    op.node.args = tuple(args)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Quantisers in the graph: one a tensor, whoever reads it."""

    graph: fx.Graph
    tensors: dict[str, Tensor]
    done: dict[str, tuple[Quantizer, fx.Node]]  # tensor -> its quantiser, and the rounded values

    def read(self, reader: fx.Node, quantizer: Quantizer, window: Window | None) -> None:
        """The op reads its tensor rounded, scaled and shifted: its weight and bias undo that."""
        data = reader.args[0]
        assert isinstance(data, fx.Node)
        node = self._pair(reader, data, quantizer, window)
        reader.args = (node, *reader.args[1:])

    def read_by_chain(
        self, chain: Sequence[tuple[fx.Node, Window | None]], change: SiteChange
    ) -> None:
        """The first op of a chain reads the layer's tensor so, the others what passes between them."""
        quantizers = [change.quantizer, *(factor.quantizer for factor in change.factors[1:])]
        for (node, window), quantizer in zip(chain, quantizers, strict=True):
            if quantizer is not None:
                self.read(node, quantizer, window)

    def read_by_add(self, add: fx.Node, change: SiteChange) -> None:
        """An addition reads its operands rounded, in their own units.

        Raises:
            ShapeError: An operand that the addition does not have.
        """
        operands = {a.name: a for a in add.args if isinstance(a, fx.Node)}
        for name, quantizer in change.operands.items():
            if name not in operands:
                raise ShapeError(
                    f"{change.site.name}: {name} is no operand of {add.name}, which reads "
                    f"{', '.join(operands)}"
                )
            node = self._pair(add, operands[name], quantizer, None)
            add.replace_input_with(operands[name], self._restored(add, node, name, quantizer))

    def _restored(self, add: fx.Node, node: fx.Node, name: str, quantizer: Quantizer) -> fx.Node:
        with self.graph.inserting_before(add):
            if quantizer.shift:
                node = self.graph.create_node(
                    "call_function", aten.sub.Tensor, (node, quantizer.shift), name=f"{name}_back"
                )
            if quantizer.inverse_scale is None:
                return node
            scale = f"{name}_scale"
            self.tensors[scale] = 1.0 / self.tensors[f"{name}_inverse_scale"]
            factor = self.graph.create_node("get_attr", scale, name=scale)
            return self.graph.create_node(
                "call_function", aten.mul.Tensor, (node, factor), name=f"{name}_restored"
            )

    def _pair(
        self, reader: fx.Node, data: fx.Node, quantizer: Quantizer, window: Window | None
    ) -> fx.Node:
        key = data.name if quantizer.kind == "integers" else f"{data.name}{SUFFIX}"
        if key not in self.done:
            scale = quantizer.inverse_scale
            if scale is not None and window is not None:
                scale = scale.reshape(-1, *[1] * len(window.kernel))
            pair = _quantize_pair(self.graph, self.tensors, data, quantizer, scale)
            self.done[key] = (quantizer, pair)
        agreed, node = self.done[key]
        if not same_quantizer(agreed, quantizer):
            raise ShapeError(
                f"{reader.name}: the readers of {data.name} carry different quantisers; wanted one "
                "for all"
            )
        return node


def same_quantizer(left: Quantizer, right: Quantizer) -> bool:
    """Whether two quantisers map every tensor alike."""
    if left is right:
        return True
    scales = (left.inverse_scale, right.inverse_scale)
    if (scales[0] is None) != (scales[1] is None):
        return False
    if scales[0] is not None and scales[1] is not None and not torch.equal(scales[0], scales[1]):
        return False
    return (left.kind, left.step, left.low, left.high, left.shift) == (
        right.kind,
        right.step,
        right.low,
        right.high,
        right.shift,
    )


def _quantize_pair(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    node: fx.Node,
    quantizer: Quantizer,
    inverse_scale: Tensor | None,
) -> fx.Node:
    tensor = node.name
    dtype = torch.uint8 if quantizer.low >= 0 else torch.int8
    decomposed = torch.ops.quantized_decomposed
    with graph.inserting_before(_first_reader(graph, node)):
        if quantizer.kind == "fp8":
            return write_read(graph, node, quantizer)
        if inverse_scale is not None:
            name = f"{tensor}_inverse_scale"
            tensors[name] = inverse_scale.to(torch.float32)
            factor = graph.create_node("get_attr", name, name=name)
            node = graph.create_node(
                "call_function", torch.ops.aten.mul.Tensor, (node, factor), name=f"{tensor}_scaled"
            )
        if quantizer.shift:
            node = graph.create_node(
                "call_function",
                torch.ops.aten.add.Tensor,
                (node, quantizer.shift),
                name=f"{tensor}_shifted",
            )
        grid: tuple[Any, ...] = (quantizer.step, 0, quantizer.low, quantizer.high, dtype)
        codes = graph.create_node(
            "call_function",
            decomposed.quantize_per_tensor.default,
            (node, *grid),
            name=quantize_node_name(tensor),
        )
        return graph.create_node(
            "call_function",
            decomposed.dequantize_per_tensor.default,
            (codes, *grid),
            name=f"{tensor}_dequantize",
        )


def _first_reader(graph: fx.Graph, tensor: fx.Node) -> fx.Node:
    """Changes come in any order; a quantiser stands before all the readers of its tensor."""
    readers: list[fx.Node] = [node for node in graph.nodes if node in tensor.users]
    return readers[0]
