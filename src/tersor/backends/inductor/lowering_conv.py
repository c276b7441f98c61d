"""Convolutions that read codes: ``kernels.conv8``, and whatever follows one as part of its call.

Two-dimensional ones without dilation and groups, whose padding is smaller than the kernel and the same on both
sides; others stay in floats. A call takes in, in this order, where nothing else reads what is between:
a quantiser and the addition behind it, whose other operand may be codes, too; bounds (ReLU and its like); the
next quantiser. A maximum pool in front of that quantiser is taken of codes: rounding keeps the order of values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from tersor.backends.inductor.work import Grid, Work, is_call, quantizer
from tersor.core.errors import ConfigError
from tersor.kernels.conv8 import border_offsets, conv8
from tersor.kernels.linear8 import quantize_codes

_aten = torch.ops.aten
_CONVS = (_aten.conv2d.default, _aten.conv2d.padding)
_ADD = _aten.add.Tensor
_POOL = _aten.max_pool2d.default
_BOUNDS = {  # op -> the arguments that its bounds are, or the bounds
    _aten.relu.default: (0.0, math.inf),
    _aten.relu6.default: (0.0, 6.0),
    _aten.hardtanh.default: (-1.0, 1.0),
    _aten.clamp.default: (None, None),
}
_LEAST = -128  # of an int8 code
_FILL = 4  # codes that are read at once at least; fewer channels are filled up
_WINDOW = 25  # pixels of a pool that is taken of codes
Shapes = Mapping[str, tuple[str, ...]]  # node of the graph -> its sizes, symbols as text


def floats_from(codes: Tensor, step: float, zero: int, dtype: torch.dtype) -> Tensor:
    """The values that codes stand for."""
    return ((codes.float() - zero) * step).to(dtype)


def filled(codes: Tensor, channels: int) -> Tensor:
    """Images with more channels, of code 0."""
    return torch.nn.functional.pad(codes, (0, 0, 0, 0, 0, channels - codes.shape[1]))


def pooled_codes(
    codes: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The largest code of every window."""
    (down, across), (ph, pw) = kernel, padding
    whole = torch.nn.functional.pad(codes, (pw, pw, ph, ph), value=_LEAST)
    reach = [
        slice_end(whole.shape[2 + d], kernel[d], stride[d]) for d in (0, 1)
    ]  # of the first pixel of each window
    parts = [
        whole[:, :, i : i + reach[0] : stride[0], j : j + reach[1] : stride[1]]
        for i in range(down)
        for j in range(across)
    ]
    return reduce(torch.maximum, parts)


def slice_end(size: int, kernel: int, stride: int) -> int:
    """How far windows' first pixels reach along one side."""
    return (size - kernel) // stride * stride + 1


def convolutions(work: Work) -> None:
    """Convolutions of codes in place of those of floats."""
    for node in list(work.graph.nodes):
        if node.op == "call_function" and node.target in _CONVS:
            grid, weight = quantizer(node.args[0]), node.args[1]
            window = _window(work, node)
            if grid is not None and window is not None:
                _convolution(work, node, grid, weight, window)


@dataclass(frozen=True, slots=True)
class _Window:
    stride: list[int]
    padding: list[int]


def _window(work: Work, node: fx.Node) -> _Window | None:
    """How a convolution walks, where the kernel can."""
    if not work.is_coded(node.args[1]):
        return None
    codes = work.value(node.args[1].args[0])  # type: ignore[union-attr]
    bias = node.args[2] if len(node.args) > 2 else None
    if codes is None or codes.dim() != 4 or (bias is not None and work.value(bias) is None):
        return None
    rest = [*node.args[3:], *[None] * 4]
    kernel = codes.shape[2:]
    stride, padding = _pair(rest[0], 1), _padding(rest[1], kernel)
    if _pair(rest[2], 1) != [1, 1] or rest[3] not in (None, 1) or padding is None:
        return None
    is_small = all(p < k for p, k in zip(padding, kernel, strict=True))
    return _Window(stride, padding) if is_small else None


def _pair(value: Any, default: int) -> list[int]:
    if value is None:
        return [default] * 2
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _padding(value: Any, kernel: Sequence[int]) -> list[int] | None:
    if value == "same":
        return [k // 2 for k in kernel] if all(k % 2 for k in kernel) else None
    return [0, 0] if value == "valid" else _pair(value, 0)


def _convolution(work: Work, node: fx.Node, grid: Grid, weight: fx.Node, window: _Window) -> None:
    codes, steps = (work.value(weight.args[i]) for i in (0, 1))
    assert codes is not None
    assert steps is not None
    bias = work.value(node.args[2]) if len(node.args) > 2 else None
    channels = codes.shape[1]
    kernel = codes.permute(0, 2, 3, 1)
    if channels % _FILL:
        kernel = torch.nn.functional.pad(kernel, (0, -channels % _FILL))
    scale = steps.double() * grid.step
    try:
        offset = border_offsets(kernel, scale, grid.zero, bias, window.padding)
    except ConfigError:  # too much padding for its zero point: floats
        return
    with work.graph.inserting_before(node):
        read = work.read(grid)
        if channels % _FILL:
            read = work.graph.call_function(filled, (read, kernel.shape[3]))
        product = work.graph.call_function(
            conv8,
            (
                read,
                work.constant(f"{node.name}_codes", kernel.contiguous()),
                work.constant(f"{node.name}_scale", scale.float()),
                work.constant(f"{node.name}_offset", offset),
                window.stride, window.padding, torch.float32, -math.inf, math.inf,
            ),
        )  # fmt: skip
    work.sources[product.name] = node.name
    node.replace_all_uses_with(product)


def shared_codes(work: Work) -> None:
    """What additions read of quantisers, from the codes that other readers share."""
    if not any(is_call(n, conv8) for n in work.graph.nodes):
        return
    for node in list(work.graph.nodes):
        grid = quantizer(node)
        if grid is None or not any(u.target is _ADD for u in node.users):
            continue
        with work.graph.inserting_before(node):
            arguments = (work.read(grid), grid.step, grid.zero, torch.float32)
            found = work.graph.call_function(floats_from, arguments)
        work.sources[found.name] = node.name
        node.replace_all_uses_with(found)


def conv_chains(work: Work, shapes: Shapes) -> None:
    """Let convolutions take in what follows them."""
    _pools(work)
    for node in list(work.graph.nodes):
        if is_call(node, conv8):
            _fuse(work, _Chain(work, shapes, node).followed())
    work.graph.eliminate_dead_code()


def _pools(work: Work) -> None:
    """Quantisers in front of maximum pools, where a convolution is in front of those."""
    for node in list(work.graph.nodes):
        pool: Any = node.args[0] if is_call(node, quantize_codes) else None
        if not is_call(pool, _POOL) or len(pool.users) > 1:
            continue
        window = _pool_window(pool)
        source = pool.args[0]
        before = source.args[0] if source.target in _BOUNDS else source
        if window is None or len(source.users) > 1 or not is_call(before, conv8):
            continue
        with work.graph.inserting_before(node):
            codes = work.graph.call_function(quantize_codes, (source, *node.args[1:]))
            found = work.graph.call_function(pooled_codes, (codes, *window))
        work.sources[codes.name] = work.sources.get(node.name, node.name)
        work.sources[found.name] = pool.name
        node.replace_all_uses_with(found)
        work.graph.erase_node(node)
        work.graph.erase_node(pool)


def _pool_window(pool: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    _, kernel, stride, padding, *rest = [*pool.args, *[None] * 4][:6]
    sides = _pair(kernel, 1)
    steps = sides if stride in (None, []) else _pair(stride, 1)
    is_plain = _pair(rest[0], 1) == [1, 1] and not rest[1] and not pool.kwargs
    return (sides, steps, _pair(padding, 0)) if is_plain and math.prod(sides) <= _WINDOW else None


@dataclass(slots=True)
class _Chain:
    """A convolution and what follows it, as far as one call does it.

    Attributes:
        last: The last op of it.
        inner: A quantiser before the addition.
        other: What is added.
        low, high: Bounds.
        factor: Of each channel before the codes.
        codes: The quantiser at the end.
    """

    work: Work
    shapes: Shapes
    conv: fx.Node
    last: fx.Node = field(init=False)
    inner: fx.Node | None = None
    other: fx.Node | None = None
    low: float = -math.inf
    high: float = math.inf
    factor: Tensor | None = None
    codes: fx.Node | None = None

    def __post_init__(self) -> None:
        self.last = self.conv

    def followed(self) -> "_Chain":
        """With everything that fits."""
        while self.codes is None and len(self.last.users) == 1:
            (user,) = self.last.users
            if not (self._added(user) or self._bounded(user) or self._coded(user)):
                break
        return self

    @property
    def is_bounded(self) -> bool:
        return self.low > -math.inf or self.high < math.inf

    def _added(self, user: fx.Node) -> bool:
        """An addition, perhaps behind codes that nothing else reads."""
        inner, before = None, self.last
        if is_call(user, quantize_codes) and len(user.users) == 1:
            inner = user
            before = next(iter(inner.users))
            if not is_call(before, floats_from) or len(before.users) != 1:
                return False
            user = next(iter(before.users))
        if not is_call(user, _ADD) or self.other is not None or self.is_bounded or user.kwargs:
            return False
        others = [a for a in user.args if a is not before]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return False
        if self._shape(others[0]) is None or self._shape(others[0]) != self._shape(self.conv):
            return False
        self.inner, self.other, self.last = inner, others[0], user
        return True

    def _shape(self, node: fx.Node) -> tuple[str, ...] | None:
        return self.shapes.get(self.work.sources.get(node.name, node.name))

    def _bounded(self, user: fx.Node) -> bool:
        if user.target not in _BOUNDS or user.kwargs:
            return False
        given: list[Any] = [*user.args[1:], None, None]
        low, high = (
            default if value is None else value
            for value, default in zip(given, _BOUNDS[user.target], strict=False)
        )
        if isinstance(low, fx.Node) or isinstance(high, fx.Node):
            return False
        least = -math.inf if low is None else float(low)
        most = math.inf if high is None else float(high)
        self.low = min(max(self.low, least), most)
        self.high = min(max(self.high, least), most)
        self.last = user
        return True

    def _coded(self, user: fx.Node) -> bool:
        if is_call(user, _aten.mul.Tensor) and len(user.users) == 1:
            factor = self.work.value(user.args[1])
            (reader,) = user.users
            fits = factor is not None and self._fits(factor) and is_call(reader, quantize_codes)
            if not fits:
                return False
            assert factor is not None
            self.factor, user = factor.reshape(-1), reader
        if not is_call(user, quantize_codes):
            return False
        self.codes = self.last = user
        return True

    def _fits(self, factor: Tensor) -> bool:
        """One number above 0 a channel, of a chain that is nothing but scaled by it."""
        outputs = self.work.value(self.conv.args[2])
        is_scaled = self.other is None and self.low in (-math.inf, 0.0) and self.high == math.inf
        shape = () if outputs is None else (outputs.numel(), 1, 1)
        return is_scaled and tuple(factor.shape[-3:]) == shape and bool((factor > 0).all())


def _fuse(work: Work, chain: _Chain) -> None:
    """One call in place of a chain."""
    conv = chain.conv
    if chain.last is conv:
        return
    scale, offset = (work.value(conv.args[i]) for i in (2, 3))
    assert scale is not None
    assert offset is not None
    step, zero, low, high = 1.0, 0, chain.low, chain.high
    if chain.codes is not None:
        _, step, zero, least, most = chain.codes.args  # type: ignore[assignment]
        low, high = (float(min(max(_code(v, step, zero), least), most)) for v in (low, high))  # type: ignore[type-var, arg-type]
    units = torch.full_like(scale, 1.0 / step, dtype=torch.float64)  # of the result, a unit of y
    if chain.factor is not None:
        units = units * chain.factor.double().to(units.device)
    other, gain, shift = _other(chain.other, 1.0 / step, float(zero))
    inner = None
    if chain.inner is not None:
        _, own, middle, least, most = chain.inner.args
        inner = (float(least - middle), float(most - middle), float(own) / step)  # type: ignore[operator, arg-type]
        units = torch.full_like(units, 1.0 / float(own))  # type: ignore[arg-type]
    start = offset.double() * units
    if chain.other is None:
        gain = 1.0
        if inner is None:
            start, shift = start + zero, 0.0
    name = conv.name
    with work.graph.inserting_before(chain.last):
        arguments = (
            *conv.args[:2],
            work.constant(f"{name}_scaled", (scale.double() * units).float()),
            work.constant(f"{name}_start", start.float()),
            *conv.args[4:6],
            torch.float32 if chain.codes is None else torch.int8,
            low, high, other, gain, shift, inner,
        )  # fmt: skip
        fused = work.graph.call_function(conv8, arguments)
    work.sources[fused.name] = work.sources[conv.name]
    chain.last.replace_all_uses_with(fused)
    work.graph.eliminate_dead_code()


def _code(value: float, step: float, zero: int) -> float:
    """The code of a bound."""
    return value if math.isinf(value) else round(value / step) + zero


def _other(
    node: fx.Node | None, inverse: float, zero: float
) -> tuple[fx.Node | None, float, float]:
    """What is added, its gain, and what is added besides."""
    if node is None or not is_call(node, floats_from):
        return node, inverse, zero
    codes, step, middle = node.args[:3]
    gain = float(step) * inverse  # type: ignore[arg-type]
    return codes, gain, zero - float(middle) * gain  # type: ignore[arg-type, return-value]
