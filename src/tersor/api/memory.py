"""What a build's time depends on, in the terms of a session: where prices are found again."""

from collections.abc import Callable, Mapping
from typing import Any

from tersor._version import __version__
from tersor.api.session import Session
from tersor.api.shrink import Changes
from tersor.core.jsonable import digest
from tersor.core.machine import describe_machine
from tersor.core.records import Level
from tersor.graph.contracts import Factor, Quantizer, SiteChange
from tersor.graph.serial import structure_text
from tersor.price.memory import PriceMemory

_PROTOCOL = 1  # to be raised where builds are profiled or measured in another way
_ON_DEVICE = 2  # likewise, of devices with a clock of their own


def price_memory(
    session: Session, changes: Callable[[Mapping[str, Level]], Changes]
) -> PriceMemory:
    """The memory of a session's builds: by structure, sizes and machine, not by weights or data.

    Args:
        session: Its store is where they lie.
        changes: What an assignment changes.
    """

    def detail(assignment: Mapping[str, Level]) -> list[Any]:
        """Grids and scales of the layers that change: with the levels, all that shapes a graph."""
        return [form(change) for change in changes(assignment).formats]

    return PriceMemory(
        store=session.store,
        scope=digest(
            __version__,
            _PROTOCOL,
            structure_text(session.graph),
            [
                (name, str(t.dtype), list(t.shape))
                for name, t in sorted(session.graph.module.state_dict().items())
            ],
            [
                [(name, list(array.shape)) for name, array in example.items()]
                for example in session.examples(session.settings.batch)
            ],
            session.settings.device,
            *([] if session.settings.device == "cpu" else [_ON_DEVICE]),
            describe_machine().fingerprint(),
        ),
        versions={info.name: info.version for info in session.infos},
        detail=detail,
    )


def form(change: SiteChange) -> list[Any]:
    """What of a change shapes the graph: no values, but which tensors and quantisers there are."""
    grid = None if change.quantizer is None else _grid(change.quantizer)
    operands = {tensor: _grid(quantizer) for tensor, quantizer in change.operands.items()}
    stored = [t is not None for t in (change.codes, change.weight, change.bias)]
    chain = [_factor(factor) for factor in change.factors]
    return [
        change.site.name,
        str(change.level),
        stored,
        grid,
        operands,
        *([chain] if chain else []),
    ]


def _factor(factor: Factor) -> list[Any]:
    grid = None if factor.quantizer is None else _grid(factor.quantizer)
    stored = [t is not None for t in (factor.codes, factor.weight, factor.bias)]
    return [list(factor.dense().shape), stored, grid]


def _grid(quantizer: Quantizer) -> list[Any]:
    channels = None if quantizer.inverse_scale is None else quantizer.channel_dim
    return [quantizer.low, quantizer.high, channels, quantizer.shift != 0]
