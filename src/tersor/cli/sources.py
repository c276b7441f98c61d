"""Models, data and metrics by name: ``package.module:name``, ``file.py:name`` or a file of arrays."""

import hashlib
import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import ConfigError, DataError, MissingDependencyError, TersorError

Arrays = dict[str, NDArray[Any]]

ARRAY_SUFFIXES = (".npz", ".safetensors")
_POSITIONAL = "arr_"  # the names that numpy.savez gives to arrays without one


def load_model(spec: str) -> Any:
    """The model that ``spec`` names: the path of a .pt2, or a Python name; a factory is called.

    Raises:
        ConfigError: Nothing of that name, a factory that fails, or no model.
        MissingDependencyError: PyTorch is not installed.
    """
    torch = _torch("a model")
    if spec.endswith(".pt2"):
        return spec  # whoever captures it reads it
    kinds = (torch.nn.Module, torch.export.ExportedProgram)
    value = load_object(spec)
    if not isinstance(value, kinds) and callable(value):
        value = _call(value, spec)
    if not isinstance(value, kinds):
        raise ConfigError(
            f"{spec}: found {type(value).__name__}, wanted a torch.nn.Module, an ExportedProgram, "
            "a function without parameters that returns one, or the path of a .pt2"
        )
    return value


def load_data(spec: str) -> Any:
    """The data that ``spec`` names: what an object or its factory gives, or samples of arrays.

    Raises:
        ConfigError: Nothing of that name, or a factory that fails.
        DataError: A file of arrays that can't be used.
    """
    if spec.endswith(ARRAY_SUFFIXES):
        return samples(load_arrays(Path(spec)), spec)
    value = load_object(spec)
    return _call(value, spec) if callable(value) and not hasattr(value, "__iter__") else value


def load_function(spec: str | None) -> Any:
    """A metric by name, not called; None stays None."""
    return None if spec is None else load_object(spec)


def load_object(spec: str) -> Any:
    """The object that ``package.module:name`` or ``file.py:name`` names.

    Raises:
        ConfigError: The form is wrong, the module can't be imported or has no such name.
    """
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise ConfigError(f"{spec!r}: wanted package.module:name or path/to/file.py:name")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_name(place)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
            raise ConfigError(f"{place} has no {name!r}; public names there: {known}")
        value = getattr(value, part)
    return value


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; wanted path/to/file.py:name")
    path = path.resolve()
    name = f"_tersor_source_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: Python can't import it; wanted a source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _put_on_path(path.parent)  # its neighbours import as if it were run as a script
    try:
        _guarded(lambda: spec.loader.exec_module(module), str(path))  # type: ignore[union-attr]
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_name(name: str) -> ModuleType:
    _put_on_path(Path.cwd())
    found: ModuleType = _guarded(lambda: importlib.import_module(name), name)
    return found


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _call(function: Callable[[], Any], spec: str) -> Any:
    return _guarded(function, f"{spec}()")


def _guarded(action: Callable[[], Any], where: str) -> Any:
    try:
        return action()
    except TersorError:
        raise
    except Exception as error:  # the caller's code may raise anything
        raise ConfigError(
            f"{where} raised {type(error).__name__}: {error}; --debug shows where"
        ) from error


def load_arrays(path: Path) -> Arrays:
    """Arrays by name from a .npz or .safetensors file; nothing is unpickled.

    Raises:
        DataError: No such file, another kind, damaged, empty, or a type that NumPy lacks.
    """
    if path.suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path}: wanted a file of arrays, {' or '.join(ARRAY_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    if not arrays:
        raise DataError(f"{path}: holds no array; wanted one for each input of the model")
    return arrays


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: {error}; wanted what numpy.savez writes, of plain numbers"
        ) from error


def _read_safetensors(path: Path) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            f"{path}: {error}; wanted a safetensors file whose types NumPy has (no bf16)"
        ) from error


def samples(arrays: Arrays, where: str) -> list[Any]:
    """One sample an item, batch 1: a tensor or a tuple for arr_0, arr_1 ..., else a dict by name.

    Raises:
        DataError: Arrays of different lengths, or a scalar.
        MissingDependencyError: PyTorch is not installed.
    """
    torch = _torch("samples")
    scalar = next((name for name, array in arrays.items() if array.ndim == 0), None)
    if scalar is not None:
        raise DataError(f"{where}: {scalar!r} is a scalar; wanted samples along dimension 0")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: dimension 0 is the samples, and must be equal; found {lengths}")
    try:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except TypeError as error:
        raise DataError(f"{where}: {error}") from error
    count = next(iter(lengths.values()))
    rows = ({n: t[i : i + 1] for n, t in tensors.items()} for i in range(count))
    return [_as_inputs(row) for row in rows]


def _as_inputs(row: dict[str, Any]) -> Any:
    args, kwargs = as_call(row)
    if kwargs:
        return kwargs
    return args[0] if len(args) == 1 else args


def as_call(arrays: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How arrays are handed over: arr_0, arr_1 ... in order, all other names by keyword."""
    positional = [f"{_POSITIONAL}{i}" for i in range(len(arrays))]
    if set(positional) == set(arrays):
        return tuple(arrays[name] for name in positional), {}
    return (), dict(arrays)


def first_inputs(data: Any) -> Any:
    """The first item of the data as the model's inputs: an example.

    Raises:
        DataError: The data can't be iterated or is empty.
    """
    from tersor.core.data import as_data

    parts = as_data(data)
    items = parts.calibration if parts.iterable is None else parts.iterable
    for item in items or ():
        return item if parts.to_inputs is None else parts.to_inputs(item)
    raise DataError("the data is empty; wanted at least one item")


def _torch(what: str) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{what}: PyTorch is not installed; pip install 'tersor[compress]'"
        ) from error
    return torch
