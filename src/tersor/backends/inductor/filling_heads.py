"""Sizes of heads filled up to eights, those of queries, keys and values to one: what a card's attention reads.

Kernels for 16-bit floats want one size of a head, a multiple of eight; others take three to five times as long. So
the products in front get rows of zeros in each head, which change no score and add zeros to what comes out, and the
product behind gets columns of zeros for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from tersor.backends.inductor.filling import EIGHT
from tersor.backends.inductor.work import Work, is_call, is_inner, value_of
from tersor.kernels.linear8 import linear8, quantize_codes, quantize_floats

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_TRANSPOSE = _aten.transpose.int
_LINEAR = _aten.linear.default
VIEWS = (_aten.view.default, _aten.reshape.default)
_QUANTIZERS = (quantize_codes, quantize_floats)
_UNFUSED = 5  # arguments of a product of codes whose result is floats
_SIZES = 4  # of a view as heads


@dataclass(frozen=True, slots=True)
class Read:
    """A product that attention reads, as [b, tokens, heads, size]."""

    product: fx.Node
    view: fx.Node
    heads: int
    size: int


def fill_heads(work: Work) -> None:
    """Fill the heads of every attention whose products in front and behind are known."""
    for node in list(work.graph.nodes):
        if not is_call(node, _ATTENTION):
            continue
        reads = [read_of(work.tensors, value) for value in node.args[:3]]
        known = [r for r in reads if r is not None]
        behind = _behind(work, node)
        if len(known) < len(reads) or behind is None:
            continue
        wanted = max(r.size for r in known)
        wanted += -wanted % EIGHT
        if any(r.size != wanted for r in known):
            _fill(work, node, known, behind, wanted)
    work.graph.eliminate_dead_code()


def read_of(tensors: Mapping[str, Tensor], value: Any) -> Read | None:
    """What attention reads, where nobody else does."""
    if not is_inner(value, _TRANSPOSE) or tuple(value.args[1:]) != (1, 2):
        return None
    view: Any = value.args[0]
    if not any(is_inner(view, v) for v in VIEWS) or len(view.args[1]) != _SIZES:
        return None
    product = view.args[0]
    if not (is_inner(product, _LINEAR) or is_inner(product, linear8)) or product.kwargs:
        return None
    if product.target is linear8 and len(product.args) != _UNFUSED:
        return None
    values = [value_of(tensors, a) for a in _constants(product) if a is not None]
    rows = {None if v is None else int(v.shape[0]) for v in values}
    found = _heads(view.args[1][2:], rows.pop()) if len(rows) == 1 else None
    return None if found is None else Read(product, view, *found)


def _heads(given: Any, rows: int | None) -> tuple[int, int] | None:
    """How many heads a view has, and of what size; one of the two may be left open."""
    heads, size = given
    if rows is None or not (isinstance(heads, int) and isinstance(size, int)):
        return None
    if size > 0:
        heads = rows // size
    elif heads > 0:
        size = rows // heads
    is_whole = heads * size == rows and given[0] in (-1, heads)
    return (heads, size) if is_whole and min(heads, size) > 0 else None


def _constants(product: fx.Node) -> tuple[Any, ...]:
    """Weight and bias, or codes, scale and offset."""
    return product.args[1:4] if product.target is linear8 else product.args[1:3]


def _behind(work: Work, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The view of what comes out as tokens, and the products that read it, where nobody else does."""
    turned = next(iter(node.users)) if len(node.users) == 1 else None
    if not is_inner(turned, _TRANSPOSE) or tuple(turned.args[1:]) != (1, 2):  # type: ignore[union-attr]
        return None
    flat = next(iter(turned.users))  # type: ignore[union-attr]
    if not any(is_call(flat, v) for v in VIEWS) or len(flat.args[1]) != _SIZES - 1:  # type: ignore[arg-type]
        return None
    products: list[fx.Node] = []
    for user in flat.users:
        readers = list(user.users) if user.target in _QUANTIZERS else [user]
        for reader in readers:
            source = user if user.target in _QUANTIZERS else flat
            is_product = is_call(reader, _LINEAR) or is_call(reader, linear8)
            if not is_product or reader.args[0] is not source or work.value(reader.args[1]) is None:
                return None
            products.append(reader)
    return flat, products


def _fill(
    work: Work,
    node: fx.Node,
    reads: list[Read],
    behind: tuple[fx.Node, list[fx.Node]],
    wanted: int,
) -> None:
    query, value = reads[0], reads[2]
    if node.kwargs.get("scale") is None:
        node.kwargs = {**node.kwargs, "scale": query.size**-0.5}
    for read in dict.fromkeys(reads):
        if read.size != wanted:
            _fill_rows(work, read, wanted)
    flat, products = behind
    if value.size == wanted:
        return
    heads = query.heads  # as many come out, also where several share a value
    sizes = list(flat.args[1])  # type: ignore[arg-type]
    if sizes[-1] != -1:
        flat.args = (flat.args[0], [*sizes[:-1], heads * wanted])
    for product in dict.fromkeys(products):
        _put(work, product, 1, (heads, value.size, wanted), 1)


def _fill_rows(work: Work, read: Read, wanted: int) -> None:
    for place, value in enumerate(_constants(read.product), 1):
        if value is not None:
            _put(work, read.product, place, (read.heads, read.size, wanted), 0)
    sizes = list(read.view.args[1])  # type: ignore[arg-type]
    read.view.args = (read.view.args[0], [*sizes[:2], read.heads, wanted])


def _put(
    work: Work, node: fx.Node, place: int, heads: tuple[int, int, int], dimension: int
) -> None:
    """A constant of a product with its rows or columns filled up, head by head."""
    old = work.value(node.args[place])
    assert old is not None
    count, size, wanted = heads
    is_float8 = (
        old.dtype == torch.float8_e4m3fn
    )  # which can't be padded as such; zero bits are zeros
    plain = old.detach().view(torch.uint8) if is_float8 else old.detach()
    split = plain.unflatten(dimension, (count, size))
    sides = [0, 0] * (split.dim() - 2 - dimension) + [0, wanted - size]
    filled: Tensor = pad(split, sides).flatten(dimension, dimension + 1).contiguous()
    name = f"tersor_filled_{node.name}_{place}"
    if str(node.args[place].target) in work.exact:  # type: ignore[union-attr]
        work.exact.add(name)
    work.tensors[name] = filled.view(old.dtype) if is_float8 else filled
    with work.graph.inserting_before(node):
        node.update_arg(place, work.graph.get_attr(name))
