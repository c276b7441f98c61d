"""Containers of tensors: torch's own view of them, as a plain record."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tersor.core.errors import CaptureError
from tersor.core.records import Structure


def describe(value: Any, leaves: list[Tensor], where: str = "output") -> Structure:
    """The structure of a model's output; its tensors are appended to ``leaves`` in order.

    Raises:
        CaptureError: A container or leaf that has no plain form.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return Structure(kind="tensor")
    if value is None:
        return Structure(kind="none")
    if isinstance(value, bool | int | float | str):
        return Structure(kind="constant", value=value)
    if isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
        return _named("dict" if type(value) is dict else "object", value, leaves, where)
    if isinstance(value, tuple | list):
        if hasattr(value, "_fields"):
            fields = dict(zip(value._fields, value, strict=True))
            return _named("object", fields, leaves, where, type(value).__name__)
        children = tuple(describe(v, leaves, f"{where}[{i}]") for i, v in enumerate(value))
        kind = "list" if isinstance(value, list) else "tuple"
        return Structure(kind=kind, children=children)  # type: ignore[arg-type]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _named("object", fields, leaves, where, type(value).__name__)
    raise CaptureError(_no_plain_form(value, where))


@contextmanager
def plain_outputs(module: nn.Module, value: Any) -> Iterator[None]:
    """While in here, a module gives its tensors as a tuple where torch can't see into its outputs.

    ``torch.export`` knows dataclasses only if they were registered with it.

    Args:
        module: Hooked; as it was after.
        value: What it returns.
    """
    if not any(dataclasses.is_dataclass(leaf) for leaf in pytree.tree_leaves(value)):
        yield
        return

    def opened(_module: nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
        leaves: list[Tensor] = []
        describe(output, leaves)
        return tuple(leaves)

    handle = module.register_forward_hook(opened)
    try:
        yield
    finally:
        handle.remove()


def _no_plain_form(value: Any, where: str) -> str:
    way_out = "return those from forward()"
    if hasattr(value, "get_seq_length"):
        way_out = "it is a cache: leave use_cache out of the inputs, or pass use_cache=False"
    return (
        f"{where}: found {type(value).__name__}, wanted tensors in tuples, lists, dicts or "
        f"dataclasses; {way_out}"
    )


def _named(
    kind: Any, value: Mapping[Any, Any], leaves: list[Tensor], where: str, name: str = ""
) -> Structure:
    return Structure(
        kind=kind,
        keys=tuple(str(k) for k in value),
        children=tuple(describe(v, leaves, f"{where}.{k}") for k, v in value.items()),
        type_name=name or type(value).__name__,
    )
