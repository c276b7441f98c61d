"""Structures in use: a caller's nested arguments to flat tensors, and flat results back; no torch.

A graph takes and gives flat tensors; people nest them in tuples, dictionaries and objects. A
``Structure`` says how. What is not a tensor was frozen when the model was captured, so a caller
may leave it out or repeat it, but not change it.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never

from tersor.core.errors import DataError
from tersor.core.records import Signature, Structure

_ABSENT = object()


class NamedOutput(OrderedDict[str, Any]):
    """Stands in for an output class that is not at hand: a ``ModelOutput`` or a dataclass.

    Values are reached by name (``out["logits"]``), attribute (``out.logits``) or position
    (``out[0]``, ``out[:2]``). A field that is None is no key and has no position, as in
    Hugging Face's ``ModelOutput``, but is there as an attribute.
    """

    def __init__(self, fields: Mapping[str, Any], type_name: str = "") -> None:
        super().__init__((k, v) for k, v in fields.items() if v is not None)
        object.__setattr__(self, "_type_name", type_name)
        object.__setattr__(self, "_empty", frozenset(k for k, v in fields.items() if v is None))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return self.to_tuple()[key]
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            if name in self:
                return super().__getitem__(name)
            if name in self._empty:
                return None
        raise AttributeError(
            f"{self.__dict__.get('_type_name') or 'output'} has no field {name!r}; "
            f"it has {list(self)}"
        )

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(self.values())


def count_leaves(structure: Structure) -> int:
    """How many tensors a value of this structure holds."""
    if structure.kind == "tensor":
        return 1
    return sum(count_leaves(child) for child in structure.children)


def flatten(structure: Structure, value: Any, where: str = "value") -> list[Any]:
    """The tensors of a value, in the structure's order.

    A list passes for a tuple and the reverse. A mapping or an object may leave out a child that
    holds no tensor.

    Raises:
        DataError: Another container, key, length, constant or type; names the place.
    """
    match structure.kind:
        case "tensor":
            return [_leaf(value, where)]
        case "none" | "constant":
            _check_frozen(structure, value, where)
            return []
        case "tuple" | "list":
            return _flatten_sequence(structure, value, where)
        case "dict":
            return _flatten_fields(structure, _mapping(structure, value, where), where)
        case "object":
            return _flatten_fields(structure, _object_fields(structure, value, where), where)
        case _:
            assert_never(structure.kind)


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Nest flat tensors again; an ``object`` comes back as a ``NamedOutput``.

    Raises:
        DataError: Too few or too many leaves.
    """
    wanted = count_leaves(structure)
    if len(leaves) != wanted:
        raise DataError(f"found {len(leaves)} tensors, wanted {wanted} for the model's result")
    return _take(structure, iter(leaves))


def bind(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The flat tensors of one call, whichever way its arguments are passed.

    An argument that was captured by position may be passed by name and the reverse. Arguments
    that hold no tensor may be left out. None for an argument that was not captured is no argument.

    Raises:
        DataError: A missing, unknown, repeated or ill-formed argument; names it.
    """
    slots = _slots(signature)
    given = _given(signature, slots, args, kwargs)
    leaves: list[Any] = []
    for name, structure in slots.items():
        value = given.pop(name, _ABSENT)
        if value is not _ABSENT:
            leaves += flatten(structure, value, name)
        elif count_leaves(structure):
            raise DataError(
                f"argument {name!r} is missing; the model was captured with {list(slots)}"
            )
    unknown = sorted(name for name, value in given.items() if value is not None)
    if unknown:
        raise DataError(
            f"arguments {unknown} are unknown; the model was captured with {list(slots)}; "
            "leave them out, or compress it with an example that has them"
        )
    return leaves


def places(signature: Signature) -> list[str]:
    """What the caller calls each flat tensor of a call: its argument's name, and where it lies in it."""
    found: list[str] = []
    for name, structure in _slots(signature).items():
        found += _places(structure, name)
    return found


def _places(structure: Structure, where: str) -> list[str]:
    if structure.kind == "tensor":
        return [where]
    is_keyed = structure.kind in ("dict", "object")
    keys = structure.keys if is_keyed else range(len(structure.children))
    found: list[str] = []
    for key, child in zip(keys, structure.children, strict=True):
        found += _places(child, f"{where}[{key!r}]")
    return found


def _slots(signature: Signature) -> dict[str, Structure]:
    slots = {_position_name(signature, i): child for i, child in enumerate(signature.args.children)}
    return slots | dict(zip(signature.kwargs.keys, signature.kwargs.children, strict=True))


def _position_name(signature: Signature, position: int) -> str:
    if position < len(signature.parameter_names):
        return signature.parameter_names[position]
    return f"argument {position + 1}"


def _given(
    signature: Signature,
    slots: Mapping[str, Structure],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    limit = max(len(signature.parameter_names), len(signature.args.children))
    if len(args) > limit:
        raise DataError(
            f"found {len(args)} positional arguments, wanted at most {limit}; "
            f"the model was captured with {list(slots)}"
        )
    given = {_position_name(signature, i): value for i, value in enumerate(args)}
    twice = sorted(set(given) & set(kwargs))
    if twice:
        raise DataError(f"arguments {twice} are given by position and by name; keep one")
    return given | dict(kwargs)


def _leaf(value: Any, where: str) -> Any:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise DataError(f"{where}: found {_kind(value)}, wanted a tensor or an array")
    return value


def _check_frozen(structure: Structure, value: Any, where: str) -> None:
    if type(value) is not type(structure.value) or value != structure.value:
        raise DataError(
            f"{where}: found {_kind(value) if hasattr(value, 'shape') else repr(value)}, but the "
            f"model was captured with {structure.value!r}; leave it out, or compress the model "
            "with that value"
        )


def _mapping(structure: Structure, value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: found {_kind(value)}, wanted a mapping with keys {list(structure.keys)}"
        )
    return value


def _flatten_sequence(structure: Structure, value: Any, where: str) -> list[Any]:
    if not isinstance(value, tuple | list):
        raise DataError(
            f"{where}: found {_kind(value)}, wanted a {structure.kind} of "
            f"{len(structure.children)} items"
        )
    if len(value) != len(structure.children):
        raise DataError(f"{where}: found {len(value)} items, wanted {len(structure.children)}")
    leaves: list[Any] = []
    for i, (child, item) in enumerate(zip(structure.children, value, strict=True)):
        leaves += flatten(child, item, f"{where}[{i}]")
    return leaves


def _flatten_fields(structure: Structure, value: Mapping[str, Any], where: str) -> list[Any]:
    unknown = [k for k in value if k not in structure.keys and value[k] is not None]
    if unknown:
        raise DataError(f"{where}: unknown keys {unknown}; wanted {list(structure.keys)}")
    leaves: list[Any] = []
    missing = []
    for key, child in zip(structure.keys, structure.children, strict=True):
        if key in value:
            leaves += flatten(child, value[key], f"{where}[{key!r}]")
        elif count_leaves(child):
            missing.append(key)
    if missing:
        raise DataError(f"{where}: keys {missing} are missing; wanted {list(structure.keys)}")
    return leaves


def _object_fields(structure: Structure, value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    fields = {key: getattr(value, key) for key in structure.keys if hasattr(value, key)}
    if not fields:
        raise DataError(
            f"{where}: found {_kind(value)}, wanted a {structure.type_name or 'mapping'} with "
            f"fields {list(structure.keys)}"
        )
    return fields


def _take(structure: Structure, leaves: Iterator[Any]) -> Any:
    match structure.kind:
        case "tensor":
            return next(leaves)
        case "none":
            return None
        case "constant":
            return structure.value
        case "tuple":
            return tuple(_take(child, leaves) for child in structure.children)
        case "list":
            return [_take(child, leaves) for child in structure.children]
        case "dict" | "object":
            pairs = zip(structure.keys, structure.children, strict=True)
            fields = {key: _take(child, leaves) for key, child in pairs}
            return fields if structure.kind == "dict" else NamedOutput(fields, structure.type_name)
        case _:
            assert_never(structure.kind)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
