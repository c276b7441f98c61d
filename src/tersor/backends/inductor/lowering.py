"""A graph -> the module that torch runs or compiles: integer layers, precision, layout, device.

Linears that read codes become ``kernels.linear8``; where one's result goes through an activation to the
next one's codes alone, all of it is one call (convolutions: ``lowering_conv``). Every other quantiser is
computed in floats, and weights of codes become the floats that they stand for, or stay codes (``coding``). On
CUDA devices linears that read one tensor are one product.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tersor.backends.inductor.blocks import fuse_blocks
from tersor.backends.inductor.coding import code_linears, own_tensors
from tersor.backends.inductor.encoder import fuse_encoder
from tersor.backends.inductor.filling import fill_channels
from tersor.backends.inductor.filling_heads import fill_heads
from tersor.backends.inductor.float8 import float8_linears
from tersor.backends.inductor.lowering_conv import (
    conv_chains,
    convolutions,
    shared_codes,
)
from tersor.backends.inductor.work import (
    ACTIVATIONS,
    DEQUANTIZE,
    QUANTIZE,
    WEIGHT,
    Form,
    Grid,
    Work,
    is_call,
    quantizer,
)
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.meta import sizes
from tersor.kernels.linear8 import linear8, quantize_codes, quantize_floats

_aten = torch.ops.aten
_INT8 = (-128, 127)
_SIDES = 4  # dimensions of an image
_UNFUSED = (
    5  # arguments of a product of codes without an activation: codes, weight, scale, offset, type
)


@dataclass(slots=True)
class Lowered:
    """The module, the graph's node for every node of it that has another name, and sizes of the graph's nodes."""

    module: fx.GraphModule
    sources: dict[str, str] = field(default_factory=dict)
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def lower(graph: Graph, form: Form, known: Mapping[str, tuple[str, ...]] | None = None) -> Lowered:
    """The module of a form; takes the graph's flat inputs on the device, gives its outputs.

    Args:
        graph: What to lower.
        form: How.
        known: The ``sizes`` of an earlier lowering of this graph: to find them again, torch's compilers are
            imported, which takes seconds.
    """
    shapes = (known or sizes(graph)) if form.integers else {}
    copied, tensors = copy_graph(graph.module)
    for node in copied.nodes:
        node.meta = {}
    work = Work(copied, dict(tensors), form)
    steps = _Lowering(work)
    if form.integers:
        steps.linears()
        convolutions(work)
        shared_codes(work)
    float8_linears(work)
    if form.codes:
        work.sources |= code_linears(copied, work.tensors, graph.packed)
    steps.quantizers()
    copied.eliminate_dead_code()
    steps.chains()
    conv_chains(work, shapes)
    copied.eliminate_dead_code()
    if form.eights:
        fill_channels(copied, work.tensors)
        fill_heads(work)
    if form.blocks and form.channels_last:
        steps.blocks()
    if form.blocks:
        fuse_encoder(work)
    if form.joins:
        steps.shared_reads()
        copied.eliminate_dead_code()
    steps.floats()
    steps.images()
    used = {str(n.target) for n in copied.nodes if n.op == "get_attr"}
    copied.lint()
    return Lowered(rebuild(copied, steps.moved(used)), work.sources, shapes)


def floats_of(value: Tensor, step: float, zero: int, low: int, high: int) -> Tensor:
    """What is left of a tensor that went through a quantiser, in its own type."""
    codes = torch.clamp(torch.round(value.float() * (1.0 / step)) + zero, low, high)
    return ((codes - zero) * step).to(value.dtype)


class _Lowering:
    """One graph in the making."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.graph, self.tensors, self.form = work.graph, work.tensors, work.form
        self.sources = work.sources

    def linears(self) -> None:
        """Products of codes."""
        for node in list(self.graph.nodes):
            if not is_call(node, _aten.linear.default):
                continue
            grid, weight = quantizer(node.args[0]), node.args[1]
            if grid is None or not self.work.is_coded(weight):
                continue
            self._linear(node, grid, weight)

    def _linear(self, node: fx.Node, grid: Grid, weight: fx.Node) -> None:
        codes, steps = (self.tensors[str(weight.args[i].target)] for i in (0, 1))  # type: ignore[union-attr]
        bias = node.args[2] if len(node.args) > 2 else None
        scale = steps.double() * grid.step
        offset = -scale * grid.zero * codes.sum(1, dtype=torch.float64)
        if bias is not None:
            if not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
                return
            offset = offset + self.tensors[str(bias.target)].double()
        with self.graph.inserting_before(node):
            read = self.work.read(grid)
            arguments = (
                read,
                self.graph.get_attr(str(weight.args[0].target)),  # type: ignore[union-attr]
                self.work.constant(f"{node.name}_scale", scale.float()),
                self.work.constant(f"{node.name}_offset", offset.float()),
                torch.float32,
            )
            product = self.graph.call_function(linear8, arguments)
        self.sources[product.name] = node.name
        node.replace_all_uses_with(product)

    def quantizers(self) -> None:
        """What is left of quantisers, in floats."""
        for node in list(self.graph.nodes):
            if is_call(node, WEIGHT):
                self._expand(node)
            elif is_call(node, DEQUANTIZE) and is_call(node.args[0], QUANTIZE):
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
            if not is_call(node, quantize_codes) and not is_call(node, quantize_floats):
                continue
            path, factor = [node.args[0]], None
            if is_call(path[-1], _aten.mul.Tensor):
                factor = self._vector(path[-1].args[1])
                path.append(path[-1].args[0] if factor is not None else None)
            last = path[-1]
            shape = ACTIVATIONS.get(last.target) if isinstance(last, fx.Node) else None  # type: ignore[arg-type]
            kind = "none" if shape is None else shape(path[-1])
            if shape is not None:
                path.append(path[-1].args[0])
            if is_call(path[-1], linear8) and all(len(p.users) == 1 for p in path):
                self._fuse(node, path[-1], kind, factor)

    def _vector(self, value: Any) -> Tensor | None:
        """One factor a channel of the last dimension."""
        if not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return None
        tensor = self.tensors[str(value.target)]
        return tensor if tensor.dim() == 1 and tensor.dtype == torch.float32 else None

    def _fuse(self, node: fx.Node, product: fx.Node, kind: str, factor: Tensor | None) -> None:
        is_floats = node.target is quantize_floats
        step, *grid = node.args[1:]
        zero, low, high = (0.0, *_INT8) if is_floats else grid
        dtype = torch.float8_e4m3fn if is_floats else torch.int8
        width = self.tensors[str(product.args[2].target)].numel()  # type: ignore[union-attr]
        inverse = torch.full((width,), 1.0 / float(step))  # type: ignore[arg-type]
        if factor is not None:
            if factor.numel() != width:
                return
            inverse = inverse * factor.cpu()
        with self.graph.inserting_before(node):
            constant = self.work.constant(f"{product.name}_inverse", inverse)
            arguments = (*product.args[:4], dtype, kind, constant, float(zero), low, high)  # type: ignore[arg-type]
            fused = self.graph.call_function(linear8, arguments)
        self.sources[fused.name] = self.sources[product.name]
        node.replace_all_uses_with(fused)
        self.graph.erase_node(node)
        self.graph.eliminate_dead_code()

    def blocks(self) -> None:
        """Residual blocks of few channels."""
        sources, added = fuse_blocks(self.graph, self.tensors, self.form.dtype)
        self.sources |= sources
        self.work.exact |= added

    def shared_reads(self) -> None:
        """Linears that read one tensor (queries, keys, values) as one product, cut behind it.

        A card fills up with fewer and larger kernels. Weights that others read, too, stay as they are.
        """
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in self.graph.nodes:
            if is_call(node, linear8) and len(node.args) == _UNFUSED:
                groups.setdefault((linear8, node.args[0], node.args[4]), []).append(node)
            elif is_call(node, _aten.linear.default):
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
                    self.work.exact.add(name)
                joined.append(None if whole is None else self.graph.get_attr(name))
            product = self.graph.call_function(target, (read, *joined, *rest))
            cut = self.graph.call_function(_aten.split_with_sizes.default, (product, sizes, -1))
            parts = [
                self.graph.call_function(operator.getitem, (cut, i)) for i in range(len(nodes))
            ]
        self.sources[product.name] = self.sources.get(first.name, first.name)
        for node, part in zip(nodes, parts, strict=True):
            for user in node.users:  # a part has strides that a view may not take
                if is_call(user, _aten.view.default):
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
            is_exact = name in self.work.exact or own_tensors(name)
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


def _joined(values: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Weights, biases or scales of several linears in a row; zeros for a bias that is not there."""
    known = next((v for v in values if v is not None), None)
    if known is None:
        return None
    filled = [known.new_zeros(n) if v is None else v for v, n in zip(values, sizes, strict=True)]
    if known.dtype == torch.float8_e4m3fn:  # no device joins them as such
        return torch.cat([v.view(torch.uint8) for v in filled]).view(known.dtype)
    return torch.cat(filled)


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
