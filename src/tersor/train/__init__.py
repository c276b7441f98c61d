"""Compress while training, and a fast step; public names load on first use.

``import tersor.train`` loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.train.attaching import attach
    from tersor.train.factorizer import Factorizer
    from tersor.train.lightning_callback import LightningCallback
    from tersor.train.report import Report
    from tersor.train.rescue import rescued
    from tersor.train.schedule import Schedule
    from tersor.train.shrinker import Shrinker
    from tersor.train.trainer_callback import TrainerCallback
    from tersor.train.tune import tune

_HOMES = {
    "Factorizer": "tersor.train.factorizer",
    "LightningCallback": "tersor.train.lightning_callback",
    "Report": "tersor.train.report",
    "Schedule": "tersor.train.schedule",
    "Shrinker": "tersor.train.shrinker",
    "TrainerCallback": "tersor.train.trainer_callback",
    "attach": "tersor.train.attaching",
    "rescued": "tersor.train.rescue",
    "tune": "tersor.train.tune",
}

__all__ = [
    "Factorizer",
    "LightningCallback",
    "Report",
    "Schedule",
    "Shrinker",
    "TrainerCallback",
    "attach",
    "rescued",
    "tune",
]


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
