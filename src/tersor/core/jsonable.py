"""Records to JSON and back: frozen dataclasses of plain values, unknown keys refused."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from tersor.core.errors import ConfigError

RecordT = TypeVar("RecordT")


def to_json(value: Any) -> Any:
    """Turn a record into values that ``json`` can write; non-finite floats become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{type(value).__name__} is no JSON value; records hold plain values only")


def from_json(cls: type[RecordT], data: Any, where: str = "") -> RecordT:
    """Read a record of class ``cls``.

    Raises:
        ConfigError: An unknown or missing key, or a value of another type; says where.
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: found {type(data).__name__}, wanted an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}; known are {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    missing = [
        name
        for name, f in fields.items()
        if name not in data
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: keys {missing} are missing")
    return cls(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where}: found {value!r}, wanted one of {list(get_args(hint))}")
        return value
    if origin is tuple:
        return _read_tuple(get_args(hint), value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _read_mapping(get_args(hint)[1], value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[Any]", hint), value, where)
    return _read_scalar(hint, value, where)


def _read_mapping(item: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: found {type(value).__name__}, wanted an object")
    return {str(k): _read(item, v, f"{where}[{k}]") for k, v in value.items()}


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _read(option, value, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(problems[0] if problems else f"{where}: found {value!r}, wanted null")


def _read_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: found {type(value).__name__}, wanted a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{where}: found {len(value)} items, wanted {len(args)}")
    return tuple(
        _read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and issubclass(hint, str) and isinstance(value, str):
        return _read_text(hint, value, where)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: found {value!r}, wanted {getattr(hint, '__name__', hint)}")


def _read_text(hint: type[str], value: str, where: str) -> str:
    """Text of a class of its own, which checks it."""
    try:
        return hint(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def dumps(value: Any, *, indent: int | None = None) -> str:
    """One canonical text for one record: sorted keys, no NaN literals."""
    return json.dumps(to_json(value), sort_keys=True, allow_nan=False, indent=indent)


def digest(*values: Any) -> str:
    """SHA-256 of the canonical text of ``values``, as 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(dumps(v) for v in values).encode()).hexdigest()


def read_record(cls: type[RecordT], path: object) -> RecordT:
    """Read a record from a JSON file.

    Raises:
        ConfigError: No path, or the file is absent, no JSON, or no record of that class.
    """
    name = cls.__name__
    if not isinstance(path, str | PathLike):
        raise ConfigError(
            f"{name.lower()}: found {type(path).__name__}, wanted a {name} or the path of a JSON file "
            "with one; write a dict to a file with json.dump, or change a record with "
            "dataclasses.replace"
        )
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; wanted a JSON file with a {name}") from error
    return from_json(cls, data, str(path))
