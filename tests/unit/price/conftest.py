"""A backend without a compiler: node times by a table that the fit must find again."""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest

from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice, Format, Site, Timing
from tersor.price.price import PriceTools
from tersor.price.table import Observation

CHOICE = BuildChoice(backend="fake", precision="bf16")


def timing(ms: float, spread: float = 0.0) -> Timing:
    low, high = ms * (1 - spread), ms * (1 + spread)
    return Timing(median_ms=ms, low_ms=low, high_ms=high, rounds_ms=(ms,), runs=1)


def make_sites(n: int, pinned: tuple[int, ...] = ()) -> tuple[Site, ...]:
    """Sites of two ops each; three neighbours read one tensor."""
    return tuple(
        Site(
            name=f"s{i}",
            kind="format",
            ops=(f"op{i}", f"bias{i}"),
            op_kind="linear",
            weight=f"s{i}.weight",
            shape=(4, 4),
            tensor=f"t{i // 3}",
            pinned="keep" if i in pinned else None,
        )
        for i in range(n)
    )


def all_levels(sites: tuple[Site, ...]) -> dict[str, tuple[Format, ...]]:
    return {s.name: ("bf16", "int8", "int8_weight") for s in sites}


def quantize_nodes(tensor: str) -> tuple[str, ...]:
    return (f"{tensor}_quantize", f"{tensor}_scale")


@dataclass
class Machine:
    """True times; ``overhead`` is what a call takes beyond its nodes' sum."""

    sites: tuple[Site, ...]
    seed: int = 0
    noise: float = 0.0
    overhead: float = 1.07
    glue: float = 0.4
    glue_per_tensor: float = 0.0
    glue_per_site: float = 0.0
    fused: tuple[str, ...] = ()  # tensors whose quantiser shows as no node
    native: dict[str, float] = field(init=False)
    int8: dict[str, float] = field(init=False)
    quantizer: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.native = {s.name: float(rng.uniform(0.1, 1)) for s in self.sites}
        self.int8 = {s: ms * float(rng.uniform(0.3, 0.9)) for s, ms in self.native.items()}
        tensors = sorted({s.tensor for s in self.sites if s.tensor})
        self.quantizer = {t: float(rng.uniform(0.01, 0.05)) for t in tensors}
        self.rng = np.random.default_rng(self.seed + 1)

    def nodes(self, assignment: Mapping[str, Format]) -> dict[str, float]:
        found: dict[str, float] = {}
        int8 = [s for s in self.sites if assignment.get(s.name) == "int8"]
        tensors = {s.tensor for s in int8 if s.tensor}
        for site in self.sites:
            ms = self.int8[site.name] if site in int8 else self.native[site.name]
            found |= {site.ops[0]: 0.8 * ms, site.ops[1]: 0.2 * ms}
        for tensor in sorted(tensors - set(self.fused)):
            found[f"{tensor}_quantize"] = self.quantizer[tensor]
        glue = self.glue + self.glue_per_tensor * len(tensors) + self.glue_per_site * len(int8)
        found |= {"attention": 0.7 * glue, "norm": 0.3 * glue}
        return {name: ms * self._jitter() for name, ms in found.items()}

    def total(self, assignment: Mapping[str, Format]) -> float:
        return sum(self.nodes(assignment).values()) * self.overhead * self._jitter()

    def _jitter(self) -> float:
        return float(np.exp(self.noise * self.rng.standard_normal()))

    def observe(self, assignment: Mapping[str, Format], *, held_out: bool = False) -> Observation:
        return Observation(
            assignment=assignment,
            node_ms=self.nodes(assignment),
            measured_ms=self.total(assignment),
            held_out=held_out,
        )


@dataclass
class Build:
    """What the fake backend compiles."""

    machine: Machine
    choice: BuildChoice
    assignment: Mapping[str, Format]

    def run(self, inputs: Mapping[str, object]) -> dict[str, np.ndarray]:
        raise AssertionError(f"nothing runs here, yet was asked for {inputs}")

    def profile(self) -> dict[str, float]:
        return self.machine.nodes(self.assignment)

    def serialize(self) -> dict[str, bytes]:
        return {}


@dataclass
class Bench:
    """Counts builds, and measures them by asking for their true times, in a drifting session."""

    machines: dict[str, Machine]  # by the option int8_linear
    drift: Callable[[int], float] = lambda _run: 1.0
    refuse: tuple[str, ...] = ()
    built: list[tuple[str, Mapping[str, Format]]] = field(default_factory=list)
    runs: int = 0
    most_alive: int = 0
    alive: weakref.WeakSet[Build] = field(default_factory=weakref.WeakSet)

    def build(self, choice: BuildChoice, assignment: Mapping[str, Format]) -> Build:
        way = str(choice.options.get("int8_linear", "linear"))
        if way in self.refuse and "int8" in assignment.values():
            raise BackendError(f"{way}: can't be lowered")
        self.built.append((way, assignment))
        made = Build(self.machines[way], choice, assignment)
        made.__class__.__hash__ = object.__hash__  # type: ignore[method-assign]
        self.alive.add(made)
        self.most_alive = max(self.most_alive, len(self.alive))
        return made

    def measure(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        self.runs += 1
        factor = self.drift(self.runs)
        return {name: timing(float(str(call())) * factor) for name, call in calls.items()}

    def tools(self, reference_ms: float = 5.0) -> PriceTools:
        return PriceTools(
            build=self.build,
            run=lambda b: b.machine.total(b.assignment),  # type: ignore[attr-defined]
            measure=self.measure,
            reference=lambda: reference_ms,
            reference_ms=reference_ms,
            quantize_nodes=quantize_nodes,
        )


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """This file: tests are no package, so that they can't import it."""
    return sys.modules[__name__]
