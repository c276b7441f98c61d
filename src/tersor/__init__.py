"""Terse tensors: the smallest, fastest model that meets a target measured on your own hardware.

Public names load on first use, so ``import tersor`` loads neither torch nor a backend.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tersor._version import __version__

if TYPE_CHECKING:
    from tersor import train
    from tersor.api import (
        apply_plan,
        bench,
        compare,
        compress,
        doctor,
        export,
        inspect,
        load,
        profile,
        read_report,
        verify,
    )
    from tersor.core.data import Data, Metric
    from tersor.core.errors import TersorError
    from tersor.core.ranks import Ranks
    from tersor.core.records import Plan, Verdict
    from tersor.core.recovery import Recover
    from tersor.core.target import Target
    from tersor.runtime.guards import Guards

_HOMES = {
    **dict.fromkeys(
        (
            "apply_plan", "bench", "compare", "compress", "doctor", "export", "inspect", "load",
            "profile", "read_report", "verify",
        ),
        "tersor.api",
    ),
    "Data": "tersor.core.data",
    "Metric": "tersor.core.data",
    "Target": "tersor.core.target",
    "Plan": "tersor.core.records",
    "Ranks": "tersor.core.ranks",
    "Recover": "tersor.core.recovery",
    "Verdict": "tersor.core.records",
    "Guards": "tersor.runtime.guards",
    "TersorError": "tersor.core.errors",
}  # fmt: skip

__all__ = [
    "Data",
    "Guards",
    "Metric",
    "Plan",
    "Ranks",
    "Recover",
    "Target",
    "TersorError",
    "Verdict",
    "__version__",
    "apply_plan",
    "bench",
    "compare",
    "compress",
    "doctor",
    "export",
    "inspect",
    "load",
    "profile",
    "read_report",
    "train",
    "verify",
]


class _Package(ModuleType):
    """A stage's folder may have the name of a public function (``verify``): the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # what importing a folder sets
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "train":
        return import_module("tersor.train")
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
