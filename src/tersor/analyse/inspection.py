"""What may be chosen in a model, and what may not and why."""

from dataclasses import dataclass, field

from tersor.core.records import Signature, Site


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
    """

    signature: Signature
    sites: tuple[Site, ...]
    unsupported: dict[str, str] = field(default_factory=dict)
    macs: int = 0
    size_bytes: int = 0
    nodes: int = 0
