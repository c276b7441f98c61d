"""Layers of transformers in few launches: ``kernels.narrow_attention`` and ``kernels.narrow_linear``.

An attention of few tokens takes in its queries, keys and values, and the norm in front of them. A linear takes in
the norm in front of it that nothing else reads, the activation, the addition and the norm behind it, where nothing
else reads what is between. What has none of these stays a product of the library's. Weights are constants. Linears on
8-bit codes (``kernels.linear8``) take in what is behind them likewise, and whatever such a layer gives is written as codes
where it is read as codes (``kernels.narrow_linear8``). Graphs that write to what they read stay as they are.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tersor.backends.inductor.filling import EIGHT
from tersor.backends.inductor.filling_heads import VIEWS, Read, read_of
from tersor.backends.inductor.work import (
    ACTIVATIONS,
    Work,
    float_constant,
    is_call,
    is_inner,
    value_of,
)
from tersor.graph.edit import parameters_by_name
from tersor.graph.mutation import has_mutation
from tersor.kernels.linear8 import linear8, quantize_codes, quantize_floats
from tersor.kernels.narrow_attention import SIZES, TOKENS, attention_weights, narrow_attention
from tersor.kernels.narrow_linear import READ, ROW, linear_weights, narrow_linear
from tersor.kernels.narrow_linear8 import linear8_weights, narrow_linear8

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_LINEAR = _aten.linear.default
_NORM = _aten.layer_norm.default
_TRANSPOSE = _aten.transpose.int
_READS = 3  # queries, keys, values
_FLAT = 3  # sizes of a view as tokens
_OPTIONS = ("attn_mask", "dropout_p", "is_causal")  # of an attention, behind what it reads
_EPS, _USUAL_EPS = 4, 1e-5  # where a norm has it, and what goes without saying
# The smaller and the larger side of a weight: beyond them launches matter little.
_NARROW, _WIDE = 512, 2048
# Sides from which products of codes are worth their price: below, launches are all that there is.
_EIGHT_NARROW, _EIGHT_WIDE = 256, 1024
# Arguments of ``narrow_linear``, and of ``narrow_linear8``.
_SUMS, _ADDED, _SCALE, _WIDTH = 3, 4, 5, 7
_WRITTEN, _CODES = 13, 14
_PLAIN_LINEAR8 = 5  # arguments of a product of codes without an activation
_Linear = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm of the last dimension whose scale and shift are constants or not there."""

    node: fx.Node
    source: Any
    width: int
    parts: tuple[Tensor | None, Tensor | None]
    eps: float


@dataclass(frozen=True, slots=True)
class _Options:
    """What an attention says beside what it reads."""

    mask: Any
    causal: bool
    scale: float | None


@dataclass(frozen=True, slots=True)
class _Attention:
    reads: tuple[Read, Read, Read]
    linears: tuple[_Linear, _Linear, _Linear]
    norm: _Norm | None
    options: _Options
    flat: fx.Node  # what comes out, as tokens

    @property
    def source(self) -> Any:
        """What the norm reads, or the products."""
        return self.reads[0].product.args[0] if self.norm is None else self.norm.source


@dataclass(slots=True)
class _Layer:
    """A linear and what goes with it; ``factor``: of a product of codes."""

    product: fx.Node
    weight: Tensor
    bias: Tensor | None
    factor: Tensor | None = None
    first: _Norm | None = None
    activation: str = "none"
    added: Any = None
    last: _Norm | None = None
    end: fx.Node = field(init=False)  # whose place the op takes
    parts: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = self.product
        self.parts.append(self.product)

    @property
    def is_more(self) -> bool:
        """Whether anything goes with it."""
        return self.first is not None or self.end is not self.product


def fuse_encoder(work: Work) -> None:
    """Let attentions and linears be one op each, with what is around them."""
    if has_mutation(work.graph):  # what is read later may be another value then
        return
    for node in list(work.graph.nodes):
        found = attention_at(node, work.tensors)
        if found is not None:
            _put_attention(work, node, found)
    work.graph.eliminate_dead_code()
    for node in list(work.graph.nodes):
        layer = layer_at(node, work.tensors)
        if layer is not None:
            _put_layer(work, layer)
            work.graph.eliminate_dead_code()
    for node in work.graph.nodes:
        _widen(node)
    for node in list(work.graph.nodes):
        _write_codes(work, node)


def encoder_ops(module: fx.GraphModule) -> frozenset[str]:
    """The names of the linears, attentions and additions that such ops take in and would be slower in 8 bits."""
    tensors = parameters_by_name(module)
    names: set[str] = set()
    if has_mutation(module.graph):
        return frozenset()
    for node in module.graph.nodes:
        attention = attention_at(node, tensors)
        if attention is not None:
            names |= {node.name, *(r.product.name for r in attention.reads)}
        layer = layer_at(node, tensors)
        if layer is not None:
            is_wide = _is_wide(layer.weight)
            names |= {p.name for p in layer.parts if p is not layer.product or not is_wide}
    return frozenset(names)


def attention_at(node: fx.Node, tensors: Mapping[str, Tensor]) -> _Attention | None:
    """The attention of a node with its queries, keys and values, where a kernel has it."""
    options, reads = _options(node), _reads(node, tensors)
    if options is None or reads is None:
        return None
    flat = _flat(node, reads)
    known = [_linear(r.product, tensors) for r in reads]
    linears = [linear for linear in known if linear is not None]
    if flat is None or len(linears) < _READS or linears[0][0].shape[1] > _NARROW:
        return None
    source = reads[0].product.args[0]
    norm = _norm(source, tensors)
    if norm is not None and (
        norm.width > READ or set(norm.node.users) != {r.product for r in reads}
    ):
        norm = None
    return _Attention(reads, (linears[0], linears[1], linears[2]), norm, options, flat)


def _options(node: fx.Node) -> _Options | None:
    if not is_call(node, _ATTENTION):
        return None
    given = dict(zip(_OPTIONS, node.args[_READS:], strict=False)) | dict(node.kwargs)
    scale, causal = given.get("scale"), given.get("is_causal", False)
    is_known = isinstance(scale, float | int | None) and isinstance(causal, bool)
    if given.get("dropout_p") or given.get("enable_gqa") or not is_known:
        return None
    return _Options(given.get("attn_mask"), causal, None if scale is None else float(scale))  # type: ignore[arg-type]


def _reads(node: fx.Node, tensors: Mapping[str, Tensor]) -> tuple[Read, Read, Read] | None:
    """Three linears of one tensor, as heads of as many tokens."""
    found = [read_of(tensors, value) for value in node.args[:_READS]]
    reads = [r for r in found if r is not None and is_call(r.product, _LINEAR)]
    if len(reads) < _READS or len({r.product for r in reads}) < _READS:
        return None
    query, key, value = reads
    tokens = {r.view.args[1][1] for r in reads}  # type: ignore[index]
    count = query.view.args[1][1]  # type: ignore[index]
    is_small = len(tokens) == 1 and isinstance(count, int) and 1 <= count <= TOKENS
    is_even = len({r.heads for r in reads}) == 1 and query.size == key.size
    is_one = len({r.product.args[0] for r in reads}) == 1
    if not is_small or not is_even or not is_one or max(key.size, value.size) > SIZES[-1]:
        return None
    return query, key, value


def _flat(node: fx.Node, reads: tuple[Read, Read, Read]) -> fx.Node | None:
    """The view of what an attention gives as [b, tokens, all heads], where nobody reads it otherwise."""
    turned: Any = next(iter(node.users)) if len(node.users) == 1 else None
    if not is_inner(turned, _TRANSPOSE) or tuple(turned.args[1:]) != (1, 2):
        return None
    flat = next(iter(turned.users))
    if not any(is_call(flat, v) for v in VIEWS) or len(flat.args[1]) != _FLAT:
        return None
    batch, tokens, width = flat.args[1]
    view: Any = reads[0].view
    samples, wanted, *_ = view.args[1]
    # A width that is left open is that of all heads where there are as many samples as before.
    is_whole = width == reads[2].heads * reads[2].size or (width == -1 and batch == samples)
    return flat if tokens == wanted and is_whole else None


def layer_at(node: fx.Node, tensors: Mapping[str, Tensor]) -> _Layer | None:
    """The linear of a node with what a kernel computes around it; None: there is nothing."""
    linear, coded = _linear(node, tensors), _coded(node, tensors)
    if linear is not None and _is_narrow(linear[0]):
        layer = _Layer(node, *linear)
    elif coded is not None and _is_narrow(coded[0]):
        layer = _Layer(node, *coded)
    else:
        return None
    norm = _norm(node.args[0], tensors)
    if norm is not None and norm.width <= READ and len(norm.node.users) == 1:
        layer.first = norm
    after = _only_user(node)
    if after is not None and after.target in ACTIVATIONS:
        layer.activation = ACTIVATIONS[after.target](after)  # type: ignore[index]
        layer.end = after
    _take_addition(layer)
    last = _norm(_only_user(layer.end), tensors) if layer.end is not node else None
    if last is not None and last.width == layer.weight.shape[0] <= ROW:
        layer.last, layer.end = last, last.node
    return layer if layer.is_more else None


def _is_narrow(weight: Tensor) -> bool:
    return 1 <= min(weight.shape) <= _NARROW and max(weight.shape) <= _WIDE


def _is_wide(weight: Tensor) -> bool:
    return min(weight.shape) >= _EIGHT_NARROW and max(weight.shape) >= _EIGHT_WIDE


def _coded(node: fx.Node, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weight, offset and scale of a product of codes whose result is floats."""
    if not is_call(node, linear8) or len(node.args) != _PLAIN_LINEAR8:
        return None
    weight, scale, offset = (value_of(tensors, v) for v in node.args[1:4])
    return None if weight is None or scale is None or offset is None else (weight, offset, scale)


def _take_addition(layer: _Layer) -> None:
    """Of two values, neither times a factor; constants, as those of positions, are not copied a sample."""
    after = _only_user(layer.end)
    if not is_call(after, _aten.add.Tensor) or after.kwargs:  # type: ignore[union-attr]
        return
    other = [v for v in after.args if v is not layer.end]  # type: ignore[union-attr]
    if len(other) == 1 and isinstance(other[0], fx.Node) and other[0].op != "get_attr":
        layer.added, layer.end = other[0], after  # type: ignore[assignment]
        layer.parts.append(layer.end)


def _only_user(node: fx.Node) -> fx.Node | None:
    """What reads a value, where one node alone does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _linear(node: fx.Node, tensors: Mapping[str, Tensor]) -> _Linear | None:
    """Weight and bias of a linear, where they are float32 constants."""
    if not is_call(node, _LINEAR) or node.kwargs:
        return None
    given = (*node.args, None)[2]
    weight, bias = float_constant(node.args[1], tensors), float_constant(given, tensors)
    if weight is None or weight.dim() != 2 or (bias is None) != (given is None):
        return None
    return None if bias is not None and bias.shape != weight.shape[:1] else (weight, bias)


def _norm(value: Any, tensors: Mapping[str, Tensor]) -> _Norm | None:
    if not is_call(value, _NORM) or len(value.args[1]) != 1 or value.kwargs:
        return None
    given = (*value.args[2:_EPS], None, None)[:2]
    parts = [float_constant(v, tensors) for v in given]
    if any((v is None) != (p is None) for v, p in zip(given, parts, strict=True)):
        return None
    eps = float(value.args[_EPS]) if len(value.args) > _EPS else _USUAL_EPS
    return _Norm(value, value.args[0], int(value.args[1][0]), (parts[0], parts[1]), eps)


def _put_attention(work: Work, node: fx.Node, found: _Attention) -> None:
    dtype, query, value = work.form.dtype, found.reads[0], found.reads[2]
    linears = [(_bounded(weight, dtype), bias) for weight, bias in found.linears]
    made = attention_weights(
        (linears[0], linears[1], linears[2]), query.heads, dtype=dtype,
        norm=None if found.norm is None else found.norm.parts,
    )  # fmt: skip
    scale = query.size**-0.5 if found.options.scale is None else found.options.scale
    eps = None if found.norm is None else found.norm.eps
    with work.graph.inserting_before(found.flat):
        # Products may read tokens in any form, of which the view as heads makes samples.
        view: Any = query.view
        sizes = [*view.args[1][:2], int(linears[0][0].shape[1])]
        source = work.graph.call_function(_aten.reshape.default, (found.source, sizes))
        parts = [
            work.constant(f"{node.name}_{n}", t) for n, t in zip(made._fields, made, strict=True)
        ]
        rest = (found.options.mask, value.size, scale, eps, found.options.causal)
        fused = work.graph.call_function(narrow_attention, (source, *parts, *rest))
    work.sources |= {source.name: view.name, fused.name: node.name}
    found.flat.replace_all_uses_with(fused)
    # Torch takes an attention for random, and never for dead.
    for dead in (found.flat, found.flat.args[0], node):
        work.graph.erase_node(dead)  # type: ignore[arg-type]


def _put_layer(work: Work, layer: _Layer) -> None:
    if layer.factor is not None:
        _put_coded(work, layer, layer.factor)
        return
    first, last, product = layer.first, layer.last, layer.product
    made = linear_weights(
        _bounded(layer.weight, work.form.dtype), layer.bias, dtype=work.form.dtype,
        first=None if first is None else first.parts,
        last=None if last is None else last.parts,
    )  # fmt: skip
    read = product.args[0] if first is None else first.source
    eps = (0.0 if first is None else first.eps, 0.0 if last is None else last.eps)
    with work.graph.inserting_before(layer.end):
        parts = [
            None if t is None else work.constant(f"{product.name}_{n}", t)
            for n, t in zip(made._fields, made, strict=True)
        ]
        rest = (int(layer.weight.shape[0]), layer.activation, *eps)
        arguments = (read, *parts[:3], layer.added, *parts[3:], *rest)
        fused = work.graph.call_function(narrow_linear, arguments)
    work.sources[fused.name] = work.sources.get(product.name, product.name)
    layer.end.replace_all_uses_with(fused)


def _put_coded(work: Work, layer: _Layer, factor: Tensor) -> None:
    last, product = layer.last, layer.product
    assert layer.bias is not None  # the offset of a product of codes
    made = linear8_weights(layer.weight, factor, layer.bias, None if last is None else last.parts)
    with work.graph.inserting_before(layer.end):
        parts = [
            None if t is None else work.constant(f"{product.name}_{n}", t)
            for n, t in zip(made._fields, made, strict=True)
        ]
        rest = (
            int(layer.weight.shape[0]),
            layer.activation,
            0.0,
            0.0 if last is None else last.eps,
        )
        arguments = (product.args[0], *parts[:3], None, layer.added, *parts[3:], *rest)
        floats = (torch.float32, True)  # the build's type in its place
        fused = work.graph.call_function(narrow_linear8, (*arguments, *floats, None, 1.0, 0, 0, 0))
        y = work.graph.call_function(operator.getitem, (fused, 0))
    work.sources[fused.name] = work.sources.get(product.name, product.name)
    layer.end.replace_all_uses_with(y)


def _write_codes(work: Work, node: fx.Node) -> None:
    """Let the layer whose result a quantiser reads write the codes, and its floats where others read those."""
    grid: tuple[Any, ...]
    if is_call(node, quantize_codes):
        grid = (torch.int8, *node.args[1:])
    elif is_call(node, quantize_floats):
        grid = (torch.float8_e4m3fn, node.args[1], 0, 0, 0)
    else:
        return
    y: Any = node.args[0]
    if is_call(y, narrow_linear):
        read, weight, *rest = y.args
        arguments = (read, weight, None, *rest, torch.float32, True, None, 1.0, 0, 0, 0)
        with work.graph.inserting_before(y):
            fused = work.graph.call_function(narrow_linear8, arguments)
            new = work.graph.call_function(operator.getitem, (fused, 0))
        work.sources[fused.name] = work.sources[y.name]
        y.replace_all_uses_with(new)
        work.graph.erase_node(y)
        y = new
    is_layer = is_call(y, operator.getitem) and is_call(y.args[0], narrow_linear8)
    if not is_layer or y.args[1] != 0 or y.args[0].args[_CODES] is not None:
        return
    fused = y.args[0]
    fused.args = (*fused.args[:_CODES], *grid)
    with work.graph.inserting_after(y):
        codes = work.graph.call_function(operator.getitem, (fused, 1))
    node.replace_all_uses_with(codes)
    work.graph.erase_node(node)
    if not y.users:
        fused.update_arg(_WRITTEN, False)
        work.graph.erase_node(y)


def _widen(node: fx.Node) -> None:
    """Write outputs up to an eight where all readers are such ops, whose weights have zeros for them."""
    if not is_call(node, narrow_linear) or not node.users:
        return
    is_own = node.args[_ADDED] is None and node.args[_SCALE] is None
    if is_own and all(_skips(reader, node) for reader in node.users):
        width: Any = node.args[_WIDTH]
        node.update_arg(_WIDTH, width + -width % EIGHT)


def _skips(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a product reads a value, and a norm, which would count what is more, does not."""
    is_product = is_call(reader, narrow_linear) and reader.args[_SUMS] is None
    return is_product and reader.args[0] is node and node not in reader.args[1:]


def _bounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Within what the type has: an infinite weight would make every sum one."""
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit)
