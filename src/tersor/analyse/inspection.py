"""What may be chosen in a model, and what may not and why: records only, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tersor.core.records import Exactness, Signature, Site, WidthKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """One dimension of a stored tensor that shrinks with a width."""

    tensor: str
    dim: int
    role: Literal["producer", "consumer", "follower"]
    per_unit: int  # elements of the dimension that one unit takes


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthInfo:
    """One width: units that are alike, each of which may go.

    Attributes:
        size_bytes: Of the stored tensors that it runs through, each once and whole.
        macs: Of the ops that it runs into or out of, whole, one sample.
        pinned: Why it stays whole all the same.
    """

    name: str
    kind: WidthKind
    exactness: Exactness
    units: int
    size_bytes: int
    macs: int
    coupled: tuple[Coupled, ...]
    pinned: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedInfo:
    """One dimension of a stored tensor that stays whole, with the op that holds it."""

    tensor: str
    dim: int
    size: int
    op: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A module, a site or an op in the tree of a model; numbers include everything below.

    Attributes:
        name: The last part of the path; an op that computes without a stored weight in brackets.
        path: Module path, "" for the model.
        kind: linear, conv or embedding for a site, op for an op, else the module's class.
        shape: Of a site's weight.
        size_bytes: Of stored tensors, each at one place.
        macs: One sample.
        time_percent: Share of a pass through the graph; None: not measured.
        makes: Widths that begin here.
        reads: Widths that end here or pass through.
        pinned: Why the site keeps its format.
    """

    name: str
    path: str
    kind: str
    shape: tuple[int, ...] = ()
    size_bytes: int = 0
    macs: int = 0
    time_percent: float | None = None
    makes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    pinned: str | None = None
    children: tuple["Branch", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A model as the planner sees it.

    Attributes:
        signature: Its calling convention.
        sites: Every layer with a stored weight, pinned ones with the reason.
        unsupported: Nodes with a stored weight that no site covers -> why.
        macs: Multiply-accumulates of one sample, at the sites.
        size_bytes: Of all parameters and buffers.
        nodes: Of the normalised graph.
        widths: Everything that may be made narrower, in graph order.
        pinned: Dimensions of stored tensors that may not, with op and reason.
        unknown: Ops without a rule that met a width, and so pinned it -> how often.
        mac_share: Share of all multiply-accumulates at ops that an exact width runs into or out of.
        seconds: What the analysis of the widths took.
        tree: Modules as branches, sites and ops as leaves.
        pass_ms: One profiled pass of one sample through the graph; None: not measured.
    """

    signature: Signature
    sites: tuple[Site, ...]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    macs: int = 0
    size_bytes: int = 0
    nodes: int = 0
    widths: tuple[WidthInfo, ...] = ()
    pinned: tuple[PinnedInfo, ...] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)
    mac_share: float = 0.0
    seconds: float = 0.0
    tree: Branch | None = None
    pass_ms: float | None = None
