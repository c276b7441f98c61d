"""Training: a step that is made faster by measuring.

Public names load on first use, so ``import tersor.train`` loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.train.tune import tune

_HOMES = {"tune": "tersor.train.tune"}

__all__ = ["tune"]


class _Package(ModuleType):
    """A module may have the name of a public function (``tune``): the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # what importing a module sets
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tersor.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
