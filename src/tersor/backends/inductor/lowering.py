"""A graph -> the module that torch runs or compiles: integer linears, precision, layout, device.

Linears that read codes become ``kernels.linear8``; where one's result goes through an activation to the
next one's codes alone, all of it is one call. Every other quantiser is computed in floats, and weights of
codes become the floats that they stand for, or stay codes (``coding``). On CUDA devices linears that read
one tensor are one product.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from tersor.backends.inductor.blocks import fuse_blocks
from tersor.backends.inductor.coding import code_linears, own_tensors
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.kernels.linear8 import linear8, quantize_codes

_aten = torch.ops.aten
_decomposed = torch.ops.quantized_decomposed
_QUANTIZE = _decomposed.quantize_per_tensor.default
_DEQUANTIZE = _decomposed.dequantize_per_tensor.default
_WEIGHT = _decomposed.dequantize_per_channel.default
_MOST = 127  # of an int8 code
_SHIFT = 128  # from unsigned to signed codes
_SIDES = 4  # dimensions of an image
_UNFUSED = (
    5  # arguments of a product of codes without an activation: codes, weight, scale, offset, type
)
_FUSED = {  # ops that the kernel computes behind its product
    _aten.relu.default: lambda _: "relu",
    _aten.gelu.default: lambda n: "gelu_tanh" if n.kwargs.get("approximate") == "tanh" else "gelu",
    _aten.silu.default: lambda _: "silu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a graph is lowered to.

    Attributes:
        dtype: Of floats: float32, bfloat16 or float16.
        device: Where its tensors live.
        channels_last: Images and the weights of their convolutions have their channels last.
        integers: Linears multiply codes; false: the floats that those stand for.
        joins: Linears that read one tensor become one product.
        codes: Weights that are stored as codes stay codes where a kernel reads them.
        blocks: Residual blocks of few channels become one op each; for 16-bit floats.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    integers: bool = True
    joins: bool = False
    codes: bool = False
    blocks: bool = False


@dataclass(slots=True)
class Lowered:
    """The module, and the graph's node for every node of it that has another name."""

    module: fx.GraphModule
    sources: dict[str, str] = field(default_factory=dict)


def lower(graph: Graph, form: Form) -> Lowered:
    """The module of a form; takes the graph's flat inputs on the device, gives its outputs."""
    copied, tensors = copy_graph(graph.module)
    for node in copied.nodes:
        node.meta = {}
    work = _Lowering(copied, dict(tensors), form)
    work.linears()
    if form.codes:
        work.sources |= code_linears(copied, work.tensors, graph.packed)
    work.quantizers()
    copied.eliminate_dead_code()
    work.chains()
    copied.eliminate_dead_code()
    if form.blocks:
        work.blocks()
    if form.joins:
        work.shared_reads()
        copied.eliminate_dead_code()
    work.floats()
    work.images()
    used = {str(n.target) for n in copied.nodes if n.op == "get_attr"}
    copied.lint()
    return Lowered(rebuild(copied, work.moved(used)), work.sources)


def floats_of(value: Tensor, step: float, zero: int, low: int, high: int) -> Tensor:
    """What is left of a tensor that went through a quantiser, in its own type."""
    codes = torch.clamp(torch.round(value.float() * (1.0 / step)) + zero, low, high)
    return ((codes - zero) * step).to(value.dtype)


class _Lowering:
    """One graph in the making."""

    def __init__(self, graph: fx.Graph, tensors: dict[str, Tensor], form: Form) -> None:
        self.graph = graph
        self.tensors = tensors
        self.form = form
        self.sources: dict[str, str] = {}
        self._codes: dict[fx.Node, fx.Node] = {}
        self._exact: set[str] = set()  # float32 whatever the build's type is

    def linears(self) -> None:
        """Products of codes."""
        for node in list(self.graph.nodes):
            if not self.form.integers or not _is_call(node, _aten.linear.default):
                continue
            grid, weight = _quantizer(node.args[0]), node.args[1]
            if grid is None or not self._is_coded(weight):
                continue
            self._linear(node, grid, weight)

    def _is_coded(self, weight: Any) -> bool:
        if not _is_call(weight, _WEIGHT) or weight.args[2] is not None or weight.args[3] != 0:
            return False
        codes = weight.args[0]
        return codes.op == "get_attr" and self.tensors[str(codes.target)].dtype == torch.int8

    def _linear(self, node: fx.Node, grid: "_Grid", weight: fx.Node) -> None:
        codes, steps = (self.tensors[str(weight.args[i].target)] for i in (0, 1))  # type: ignore[union-attr]
        bias = node.args[2] if len(node.args) > 2 else None
        scale = steps.double() * grid.step
        offset = -scale * grid.zero * codes.sum(1, dtype=torch.float64)
        if bias is not None:
            if not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
                return
            offset = offset + self.tensors[str(bias.target)].double()
        with self.graph.inserting_before(node):
            read = self._read(grid)
            arguments = (
                read,
                self.graph.get_attr(str(weight.args[0].target)),  # type: ignore[union-attr]
                self._constant(f"{node.name}_scale", scale.float()),
                self._constant(f"{node.name}_offset", offset.float()),
                torch.float32,
            )
            product = self.graph.call_function(linear8, arguments)
        self.sources[product.name] = node.name
        node.replace_all_uses_with(product)

    def _read(self, grid: "_Grid") -> fx.Node:
        """The codes that a quantiser's readers share."""
        if grid.node not in self._codes:
            with self.graph.inserting_after(grid.node):
                arguments = (grid.source, grid.step, grid.zero, grid.low, grid.high)
                found = self.graph.call_function(quantize_codes, arguments)
            self._codes[grid.node] = found
            self.sources[found.name] = grid.node.name
        return self._codes[grid.node]

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        name = f"tersor_{name}"
        self.tensors[name] = value
        self._exact.add(name)
        return self.graph.get_attr(name)

    def quantizers(self) -> None:
        """What is left of quantisers, in floats."""
        for node in list(self.graph.nodes):
            if _is_call(node, _WEIGHT):
                self._expand(node)
            elif _is_call(node, _DEQUANTIZE) and _is_call(node.args[0], _QUANTIZE):
                inner = node.args[0]
                with self.graph.inserting_before(node):
                    found = self.graph.call_function(floats_of, (inner.args[0], *inner.args[1:5]))
                self.sources[found.name] = node.name
                node.replace_all_uses_with(found)

    def _expand(self, node: fx.Node) -> None:
        codes, steps, zeros, axis = node.args[:4]
        if not all(isinstance(v, fx.Node) and v.op == "get_attr" for v in (codes, steps)):
            return
        if zeros is not None or not node.users:
            return
        values, scale = (self.tensors[str(v.target)] for v in (codes, steps))  # type: ignore[union-attr]
        shape = [1] * values.dim()
        shape[int(axis)] = -1  # type: ignore[arg-type]
        name = f"tersor_{node.name}"
        self.tensors[name] = values.float() * scale.float().reshape(shape)
        with self.graph.inserting_before(node):
            node.replace_all_uses_with(self.graph.get_attr(name))

    def chains(self) -> None:
        """Activation and the next codes behind a product, where nothing else reads what is between."""
        for node in list(self.graph.nodes):
            if not _is_call(node, quantize_codes):
                continue
            path, factor = [node.args[0]], None
            if _is_call(path[-1], _aten.mul.Tensor):
                factor = self._vector(path[-1].args[1])
                path.append(path[-1].args[0] if factor is not None else None)
            last = path[-1]
            shape = _FUSED.get(last.target) if isinstance(last, fx.Node) else None  # type: ignore[call-overload]
            kind = "none" if shape is None else shape(path[-1])
            if shape is not None:
                path.append(path[-1].args[0])
            if _is_call(path[-1], linear8) and all(len(p.users) == 1 for p in path):
                self._fuse(node, path[-1], kind, factor)

    def _vector(self, value: Any) -> Tensor | None:
        """One factor a channel of the last dimension."""
        if not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return None
        tensor = self.tensors[str(value.target)]
        return tensor if tensor.dim() == 1 and tensor.dtype == torch.float32 else None

    def _fuse(self, node: fx.Node, product: fx.Node, kind: str, factor: Tensor | None) -> None:
        _, step, zero, low, high = node.args
        width = self.tensors[str(product.args[2].target)].numel()  # type: ignore[union-attr]
        inverse = torch.full((width,), 1.0 / float(step))  # type: ignore[arg-type]
        if factor is not None:
            if factor.numel() != width:
                return
            inverse = inverse * factor.cpu()
        with self.graph.inserting_before(node):
            constant = self._constant(f"{product.name}_inverse", inverse)
            arguments = (*product.args[:4], torch.int8, kind, constant, float(zero), low, high)  # type: ignore[arg-type]
            fused = self.graph.call_function(linear8, arguments)
        self.sources[fused.name] = self.sources[product.name]
        node.replace_all_uses_with(fused)
        self.graph.erase_node(node)
        self.graph.eliminate_dead_code()

    def blocks(self) -> None:
        """Residual blocks of few channels."""
        sources, added = fuse_blocks(self.graph, self.tensors, self.form.dtype)
        self.sources |= sources
        self._exact |= added

    def shared_reads(self) -> None:
        """Linears that read one tensor (queries, keys, values) as one product, cut behind it.

        A card fills up with fewer and larger kernels. Weights that others read, too, stay as they are.
        """
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in self.graph.nodes:
            if _is_call(node, linear8) and len(node.args) == _UNFUSED:
                groups.setdefault((linear8, node.args[0], node.args[4]), []).append(node)
            elif _is_call(node, _aten.linear.default):
                groups.setdefault((node.target, node.args[0]), []).append(node)
        constants = [n for n in self.graph.nodes if n.op == "get_attr"]
        readers = Counter(str(n.target) for n in constants for _ in n.users)

        def is_own(value: Any) -> bool:
            is_constant = isinstance(value, fx.Node) and value.op == "get_attr"
            return value is None or (is_constant and readers[str(value.target)] == 1)

        for (target, read, *rest), nodes in groups.items():
            found = [n for n in nodes if all(map(is_own, n.args[1:4]))]
            if len(found) > 1:
                self._share_read(target, read, rest, found)

    def _share_read(
        self, target: Callable[..., Any], read: fx.Node, rest: list[Any], nodes: list[fx.Node]
    ) -> None:
        first = nodes[0]
        count = 3 if target is linear8 else 2  # weight, scale, offset; weight, bias
        rows = [[self._value(n, i + 1) for i in range(count)] for n in nodes]
        sizes = [int(row[0].shape[0]) for row in rows if row[0] is not None]
        with self.graph.inserting_before(first):
            joined: list[fx.Node | None] = []
            for i, values in enumerate(zip(*rows, strict=True)):
                name = f"tersor_{first.name}_joined_{i}"
                whole = _joined(values, sizes)
                if whole is not None:
                    self.tensors[name] = whole
                if target is linear8:
                    self._exact.add(name)
                joined.append(None if whole is None else self.graph.get_attr(name))
            product = self.graph.call_function(target, (read, *joined, *rest))
            cut = self.graph.call_function(_aten.split_with_sizes.default, (product, sizes, -1))
            parts = [
                self.graph.call_function(operator.getitem, (cut, i)) for i in range(len(nodes))
            ]
        self.sources[product.name] = self.sources.get(first.name, first.name)
        for node, part in zip(nodes, parts, strict=True):
            for user in node.users:  # a part has strides that a view may not take
                if _is_call(user, _aten.view.default):
                    user.target = _aten.reshape.default
            node.replace_all_uses_with(part)

    def _value(self, node: fx.Node, index: int) -> Tensor | None:
        value = node.args[index] if index < len(node.args) else None
        return self.tensors[str(value.target)] if isinstance(value, fx.Node) else None

    def floats(self) -> None:
        """The build's type in place of float32."""
        target = self.form.dtype
        device = torch.device(self.form.device)
        limit = torch.finfo(target).max

        def changed(value: Any) -> Any:
            if isinstance(value, torch.device):
                return device
            if value is torch.float32:
                return target
            if (
                isinstance(value, float)
                and not -limit <= value <= limit
                and abs(value) != float("inf")
            ):
                return limit if value > 0 else -limit
            return value

        for node in list(self.graph.nodes):
            if node.op == "call_function":
                node.args = _mapped(node.args, changed)
                node.kwargs = {k: _mapped(v, changed) for k, v in node.kwargs.items()}

    def images(self) -> None:
        """Inputs and outputs between the caller's types and the build's, images as they are wanted."""
        target = self.form.dtype
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                with self.graph.inserting_after(node):
                    found = self.graph.call_function(
                        _taken, (node, target, self.form.channels_last)
                    )
                node.replace_all_uses_with(
                    found, delete_user_cb=lambda user, f=found: user is not f
                )
                self._last_placeholder(found)
            elif node.op == "output" and target != torch.float32:
                with self.graph.inserting_before(node):
                    given = [
                        self.graph.call_function(_given, (v,)) if isinstance(v, fx.Node) else v
                        for v in node.args[0]
                    ]
                node.args = (tuple(given),)

    def _last_placeholder(self, node: fx.Node) -> None:
        """Move a node behind all placeholders: those come first."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        if node.prev is not last:
            last.append(node)

    def moved(self, used: set[str]) -> dict[str, Tensor]:
        """The tensors on the device, one copy for each storage and form."""
        limit = torch.finfo(self.form.dtype).max
        known: dict[tuple[Any, ...], Tensor] = {}
        found = {}
        for name in sorted(used):
            tensor = self.tensors[name].detach()
            is_exact = name in self._exact or own_tensors(name)
            key = (
                tensor.data_ptr(),
                tensor.dtype,
                tuple(tensor.shape),
                tensor.stride(),
                is_exact,
            )
            if tensor.numel() == 0 or key not in known:
                new = tensor
                if new.dtype == torch.float32 and not is_exact:
                    if self.form.dtype != torch.float32:
                        finite = torch.clamp(new, -limit, limit)
                        new = torch.where(torch.isinf(new), new, finite).to(self.form.dtype)
                    if self.form.channels_last and new.dim() == _SIDES:
                        new = new.contiguous(memory_format=torch.channels_last)
                known[key] = new.to(self.form.device)
            found[name] = known[key]
        return found


@dataclass(frozen=True, slots=True)
class _Grid:
    """A quantiser whose codes are int8."""

    node: fx.Node
    source: Any
    step: float
    zero: int
    low: int
    high: int


def _quantizer(value: Any) -> _Grid | None:
    """The quantiser behind a value, its codes moved to int8; None: there is none."""
    if not _is_call(value, _DEQUANTIZE) or not _is_call(value.args[0], _QUANTIZE):
        return None
    node = value.args[0]
    if node.args[1:] != value.args[1:]:
        return None
    step, zero, low, high = node.args[1:5]
    shift = _SHIFT if high > _MOST else 0
    return _Grid(node, node.args[0], float(step), int(zero) - shift, low - shift, high - shift)


def _joined(values: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Weights, biases or scales of several linears in a row; zeros for a bias that is not there."""
    known = next((v for v in values if v is not None), None)
    if known is None:
        return None
    filled = [known.new_zeros(n) if v is None else v for v, n in zip(values, sizes, strict=True)]
    return torch.cat(filled)


def _is_call(value: Any, target: Callable[..., Any]) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, change) for k, v in value.items()}
    return change(value)


def _taken(value: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An input as the module works with it."""
    found = value.to(dtype) if value.dtype == torch.float32 else value
    if channels_last and found.dim() == _SIDES:
        found = found.contiguous(memory_format=torch.channels_last)
    return found


def _given(value: Tensor) -> Tensor:
    """An output as the caller knows it."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
