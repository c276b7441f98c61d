"""A backend without a compiler: node times by a table that the fit must find again."""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest

from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice, Format, Level, Site, Timing
from tersor.graph.facts import NodeFacts
from tersor.price.facts import Facts
from tersor.price.memory import PriceMemory
from tersor.price.observation import Observation
from tersor.price.tools import PriceTools

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

    machine: "Machine | Network"
    choice: BuildChoice
    assignment: Mapping[str, Level]

    def run(self, inputs: Mapping[str, object]) -> dict[str, np.ndarray]:
        raise AssertionError(f"nothing runs here, yet was asked for {inputs}")

    def profile(self) -> dict[str, float]:
        return self.machine.nodes(self.assignment)

    def serialize(self) -> dict[str, bytes]:
        return {}


@dataclass
class Bench:
    """Counts builds, and measures them by asking for their true times, in a drifting session."""

    machines: dict[str, "Machine | Network"]  # by the option int8_linear
    drift: Callable[[int], float] = lambda _run: 1.0
    refuse: tuple[str, ...] = ()
    built: list[tuple[str, Mapping[str, Level]]] = field(default_factory=list)
    runs: int = 0
    most_alive: int = 0
    alive: weakref.WeakSet[Build] = field(default_factory=weakref.WeakSet)

    def build(self, choice: BuildChoice, assignment: Mapping[str, Level]) -> Build:
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

    def tools(
        self,
        reference_ms: float = 5.0,
        facts: Facts | None = None,
        memory: PriceMemory | None = None,
    ) -> PriceTools:
        return PriceTools(
            build=self.build,
            caller=lambda b: lambda: b.machine.total(b.assignment),  # type: ignore[attr-defined]
            measure=self.measure,
            reference=lambda: reference_ms,
            reference_ms=reference_ms,
            quantize_nodes=quantize_nodes,
            facts=facts,
            memory=memory,
        )


PLANE = 196  # positions of every activation of the network below
COUNTS = (128, 112, 96, 80, 64, 48, 32, 16)


@dataclass
class Network:
    """Residual blocks of two 3x3 convolutions on one stream, and a classifier, with widths.

    A node's time is a law of its own sizes times the op's own factor. The residual add stands
    alone where the second convolution is int8, else it is fused. Reorders grow with all elements.
    A block is gone at level 0 of its branch, if there is one.
    """

    blocks: int = 4
    tile: int = 16
    noise: float = 0.0
    own: float = 0.3  # spread of the ops' factors
    overhead: float = 1.07
    seed: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed + 1)
        rng = np.random.default_rng(self.seed)
        self.factor = {
            node: float(np.exp(self.own * rng.standard_normal())) for node in self.facts({})
        }
        self.sites = self._sites()
        self.levels: dict[str, tuple[Level, ...]] = {
            s.name: COUNTS if s.kind == "width" else ("bf16", "int8", "int8_weight")
            for s in self.sites
        }

    def _sites(self) -> tuple[Site, ...]:
        widths = ["width:stem", *(f"width:b{i}" for i in range(self.blocks))]
        convs = [(f"b{i}{c}", f"t{i}{c}") for i in range(self.blocks) for c in "ac"]
        return (
            *(
                Site(
                    name=name,
                    kind="format",
                    ops=(name,),
                    op_kind="conv",
                    tensor=tensor,
                    shape=(128, 128, 3, 3),
                    size_bytes=4 * (128 * 128 * 9 + 128),
                )
                for name, tensor in convs
            ),
            Site(
                name="head",
                kind="format",
                ops=("fc",),
                op_kind="linear",
                tensor="pooled",
                shape=(1000, 128),
                size_bytes=4 * 1000 * 129,
            ),
            *(Site(name=w, kind="width", ops=(), units=128) for w in widths),
        )

    def facts(self, assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
        self.calls += 1
        stream = int(assignment.get("width:stem", 128))
        found: dict[str, NodeFacts] = {}
        for i in range(self.blocks):
            if not assignment.get(f"branch:b{i}", 1):
                continue
            inner = int(assignment.get(f"width:b{i}", 128))
            found[f"b{i}a"] = conv_facts(stream, inner)
            found[f"b{i}c"] = conv_facts(inner, stream)
            found[f"add{i}"] = NodeFacts(
                kind="elementwise", in_elements=2 * stream * PLANE, out_elements=stream * PLANE
            )
        found["pool"] = NodeFacts(kind="pool", in_elements=stream * PLANE, out_elements=stream)
        found["fc"] = NodeFacts(
            kind="linear",
            macs=stream * 1000,
            weight_elements=stream * 1000,
            in_elements=stream,
            out_elements=1000,
            inputs=stream,
            outputs=1000,
        )
        return found

    def law(self, node: str, facts: NodeFacts, *, int8: bool) -> float:
        if facts.macs:
            tiles = -(-(facts.inputs // facts.window) // self.tile) * -(-facts.outputs // self.tile)
            rows = facts.out_elements // facts.outputs
            ms = 0.004 + 4e-6 * tiles * facts.window * rows + 2e-7 * facts.out_elements
            return self.factor[node] * ms * (0.55 if int8 else 1.0)
        return self.factor[node] * (0.003 + 6e-7 * facts.out_elements)

    def exact(self, assignment: Mapping[str, Level]) -> dict[str, float]:
        facts = self.facts(assignment)
        is_eight_bit = {s.name for s in self.sites if assignment.get(s.name) == "int8"}
        found: dict[str, float] = {"mask": 0.05}
        elements = 0
        for node, own in facts.items():
            site = "head" if node == "fc" else node
            if node.startswith("add") and f"b{node[3:]}c" not in is_eight_bit:
                continue
            found[node] = self.law(node, own, int8=site in is_eight_bit)
            elements += own.out_elements if own.macs else 0
        found["Reorder"] = 2e-7 * elements
        tensors = {s.tensor for s in self.sites if s.name in is_eight_bit and s.ops[0] in facts}
        return found | {f"{t}_quantize": 0.004 for t in sorted(str(t) for t in tensors)}

    def nodes(self, assignment: Mapping[str, Level]) -> dict[str, float]:
        return {name: ms * self._jitter() for name, ms in self.exact(assignment).items()}

    def total(self, assignment: Mapping[str, Level]) -> float:
        return sum(self.exact(assignment).values()) * self.overhead * self._jitter()

    def _jitter(self) -> float:
        return float(np.exp(self.noise * self.rng.standard_normal()))

    def observe(self, assignment: Mapping[str, Level], *, held_out: bool = False) -> Observation:
        return Observation(
            assignment=assignment,
            node_ms=self.nodes(assignment),
            measured_ms=self.total(assignment),
            held_out=held_out,
        )


def conv_facts(inp: int, out: int, window: int = 9) -> NodeFacts:
    """A convolution that keeps the plane."""
    return NodeFacts(
        kind="conv",
        macs=inp * out * window * PLANE,
        weight_elements=inp * out * window,
        in_elements=inp * PLANE,
        out_elements=out * PLANE,
        inputs=inp * window,
        outputs=out,
        window=window,
    )


@pytest.fixture
def how_sure() -> None:
    """Tables say how sure they are: four more fits each, for tests that ask for it."""


@pytest.fixture(autouse=True)
def _prices_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "how_sure" not in request.fixturenames:
        monkeypatch.setattr("tersor.price.table.uncertain", lambda *_: None)


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """This file: tests are no package, so that they can't import it."""
    return sys.modules[__name__]
