"""Settings that a model's ``config`` needs while it is captured, as Hugging Face's models have.

Caches of keys and values are objects that no graph can return, and experts that are run one by
one depend on the data. Both are switched by the config, which every module may hold and nest.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# "batched_mm" computes all experts of a token as one product: plain ops for any input.
WITHOUT_CACHE: Mapping[str, Any] = {"use_cache": False}
EXPORTABLE: Mapping[str, Any] = {"use_cache": False, "_experts_implementation": "batched_mm"}
_DEPTH = 4  # of configs within configs


@contextlib.contextmanager
def configured(model: nn.Module, settings: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of every config under the model that has them; as before afterwards."""
    found = _configs(model)
    before = [
        (config, name, getattr(config, name))
        for config in found
        for name in settings
        if hasattr(config, name)
    ]
    try:
        for config, name, _ in before:
            setattr(config, name, settings[name])
        yield
    finally:
        for config, name, value in before:  # outer configs first: theirs reaches the inner ones
            setattr(config, name, value)


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        _add(vars(module).get("config"), found, _DEPTH)
    return list(found.values())


def _add(value: Any, found: dict[int, Any], depth: int) -> None:
    if not _is_config(value) or id(value) in found or not depth:
        return
    found[id(value)] = value
    for inner in vars(value).values():
        _add(inner, found, depth - 1)


def _is_config(value: Any) -> bool:
    """An object of plain attributes; no module, class, function, container or number."""
    is_plain = hasattr(value, "__dict__") and not isinstance(value, type | nn.Module)
    return is_plain and not callable(value)
