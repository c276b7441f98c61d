"""What pricing calls: everything of it that is not arithmetic comes from outside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tersor.core.records import BuildChoice, Level
from tersor.graph.contracts import Executable
from tersor.price.baseline import Call, Meter
from tersor.price.facts import Facts
from tersor.price.memory import PriceMemory
from tersor.price.table import QuantizeNodes
from tersor.price.terms import PackedBytes, no_packed_levels


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTools:
    """What pricing calls.

    Args:
        build: Makes the build of an assignment (site -> level) on a choice.
        caller: A build -> a call of it on example inputs, at the built shapes; on a card one that times itself.
        measure: Measures callables interleaved.
        reference: The best uncompressed build, ready to call.
        reference_ms: Its median when it was chosen.
        quantize_nodes: Tensor -> profile names of its quantiser.
        runs: Whether a way to build takes a level of a site; else it has no price there.
        facts: Sizes of every node of the graph of an assignment, in graph order, by the names
            that profiles use; needed where sites are widths.
        settle: What is really built for an assignment: nothing is chosen inside of a branch that
            is gone.
        note: Takes what was dropped, and why.
        stored: Node -> bytes of what it reads that no format site counts.
        packed_bytes: Bytes of a site's weight at a packed level, by its rows and elements.
        native_ms: Backend -> latency of its uncompressed build.
        memory: Builds and tables of earlier sessions; None to measure everything.
    """

    build: Callable[[BuildChoice, Mapping[str, Level]], Executable]
    caller: Callable[[Executable], Call]
    measure: Meter
    reference: Call
    reference_ms: float
    quantize_nodes: QuantizeNodes
    runs: Callable[[BuildChoice, str, Level], bool] = lambda *_: True
    facts: Facts | None = None
    settle: Callable[[Mapping[str, Level]], Mapping[str, Level]] = lambda assignment: assignment
    note: Callable[[str], object] = str
    stored: Mapping[str, int] = field(default_factory=dict)
    packed_bytes: PackedBytes = no_packed_levels
    native_ms: Mapping[str, float] = field(default_factory=dict)
    memory: PriceMemory | None = None
