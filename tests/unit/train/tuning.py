"""A small network, its step, and a job, for the tests of tuning."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tersor.core.records import Timing
from tersor.timing.protocol import Protocol
from tersor.train.tune_batches import draw_pool
from tersor.train.tune_steps import Job, Platform, nothing

CPU = torch.device("cpu")


def network(seed: int = 0) -> nn.Module:
    """[b, 1, 6, 6] -> [b, 3]; batch norm, and random numbers in every step.

    No bias in front of the norm: its gradient is rounding alone, which Adam would make large.
    """
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
            nn.Dropout(0.1), nn.Linear(4 * 4, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip


def batches(count: int = 6, rows: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 1, 6, 6, generator=generator), torch.arange(rows) % 3)
        for _ in range(count)
    ]


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def platform(**changes: Any) -> Platform:
    values = {
        "name": "a test's machine",
        "memory_bytes": 10**9,
        "cores": 2,
        "has_bf16": True,
        "synchronize": nothing,
    }
    return Platform(**{**values, **changes})


def job(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    source: Iterable[Any] | None = None,
    **changes: Any,
) -> Job:
    model = model or network()
    source = batches() if source is None else source
    values: dict[str, Any] = {
        "step": step,
        "model": model,
        "optimizer": optimizer or SGD(model.parameters(), 0.05, momentum=0.9),
        "source": source,
        "device": CPU,
        "platform": platform(),
        "pool": draw_pool(source, 6, 1e9),
    }
    return Job(**{**values, **changes})


def told(*milliseconds: float) -> Callable[[Mapping[str, Any], Protocol], dict[str, Timing]]:
    """A measurement whose times are known beforehand: of what is on, then of each candidate."""

    def measure(calls: Mapping[str, Any], protocol: Protocol) -> dict[str, Timing]:
        for call in calls.values():
            call()
        assert len(calls) <= len(milliseconds)
        return {
            name: Timing(
                median_ms=ms, low_ms=ms, high_ms=ms, rounds_ms=(ms,) * protocol.rounds, runs=20
            )
            for name, ms in zip(calls, milliseconds, strict=False)
        }

    return measure
