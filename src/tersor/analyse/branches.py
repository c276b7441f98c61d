"""Residual branches and blocks as sites, and what one statistics pass knows about them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tersor.analyse.sites import matches
from tersor.core.levels import KEPT
from tersor.core.records import Site
from tersor.graph.axes import Axes
from tersor.graph.branches import BranchStatistics
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, execute, last_uses
from tersor.graph.operators import as_rows, output_rows, row_count
from tersor.graph.residuals import BRANCH_PREFIX, Branch, find_branches
from tersor.observe.statistics import enough_rows, token_mask
from tersor.observe.streams import MomentStream
from tersor.ops.moments import Moments


def branch_sites(graph: Graph, keep: Sequence[str] = ()) -> tuple[Site, ...]:
    """One site for each branch and each block, in the order of the graph.

    Args:
        graph: Normalised.
        keep: Patterns of layers that stay as they are: a branch around one stays, too, and so does
            one whose projection shortcut is one.
    """
    return tuple(_site(graph, branch, keep) for branch in find_branches(graph))


def _site(graph: Graph, branch: Branch, keep: Sequence[str]) -> Site:
    members = _members(graph, branch)
    around = () if branch.projection is None else (branch.projection,)
    layers = [str(op.weight.target).removesuffix(".weight") for op in (*branch.ops, *around)]
    names = [branch.name, branch.name.removeprefix(BRANCH_PREFIX), *layers]
    pattern = next((p for p in keep if any(matches(name, p) for name in names)), None)
    return Site(
        name=branch.name,
        kind="branch",
        ops=tuple(op.node.name for op in branch.ops),
        units=KEPT,
        members=members,
        macs=branch.macs,
        size_bytes=sum(_bytes(attribute(graph.module, name)) for name in members),
        pinned=None if pattern is None else f"kept: matches {pattern!r}",
    )


def sites_inside(
    graph: Graph, sites: Sequence[Site], axes: Axes | None = None
) -> dict[str, tuple[str, ...]]:
    """For each branch among some sites, the sites that go with it.

    Args:
        graph: Normalised.
        sites: Of any kinds.
        axes: Its widths; needed where sites are widths.
    """
    branches = {branch.name: branch for branch in find_branches(graph)}
    found: dict[str, tuple[str, ...]] = {}
    for own in (site for site in sites if site.kind == "branch"):
        body, members = branches[own.name].body, set(own.members)

        def is_inside(site: Site, body: frozenset[str] = body, members: set[str] = members) -> bool:
            if site.kind == "branch":
                return branches[site.name].body < body
            if site.kind == "format":
                return set(site.ops) <= body
            assert axes is not None  # a width comes from them
            return {coupling.tensor for coupling in axes[site.width].couplings} <= members

        found[own.name] = tuple(site.name for site in sites if site is not own and is_inside(site))
    return found


def _members(graph: Graph, branch: Branch) -> tuple[str, ...]:
    """Tensors that nothing outside the branch reads."""
    nodes = [node for node in graph.module.graph.nodes if node.op == "get_attr" and node.users]
    inside = {str(node.target) for node in nodes if node.name in branch.body}
    outside = {str(node.target) for node in nodes if node.name not in branch.body}
    return tuple(sorted(inside - outside))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass
class _Streams:
    branch: Branch
    total: Tensor
    count: int = 0
    moments: MomentStream = field(default_factory=MomentStream)


def branch_statistics(
    graph: Graph,
    sites: Sequence[Site],
    batches: Iterable[tuple[Tensor, ...]],
    n_batches: int | None = None,
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Mapping[str, BranchStatistics]:
    """Means, and moments where a map can take the branch's place, by site name, in one pass.

    Args:
        graph: The original graph; only read.
        sites: Branches of it; pinned ones are left out.
        batches: Flat inputs of the calibration part.
        n_batches: How many batches there are, to spread the rows; None: ``batches`` has a length.
        seed: Of the choice of rows.
        advance: Called after each batch.
    """
    wanted = {site.name for site in sites if site.pinned is None}
    streams: dict[str, list[_Streams]] = {}
    for branch in find_branches(graph):
        if branch.name in wanted:
            total = torch.zeros(branch.channels, dtype=torch.float64)
            streams.setdefault(branch.add.name, []).append(_Streams(branch, total))
    batches = list(batches) if n_batches is None else batches
    share = n_batches or len(list(batches))
    generator = torch.Generator().manual_seed(seed)
    done = _last_uses(graph, [s.branch for found in streams.values() for s in found])
    for flat in batches:
        mask, stream = token_mask(graph.signature, flat), iter(flat)
        env: dict[str, Any] = {}
        with torch.no_grad():
            for node in graph.module.graph.nodes:
                is_input = node.op == "placeholder"
                env[node.name] = next(stream) if is_input else execute(graph.module, node, env)
                for found in streams.get(node.name, ()):
                    _record(found, env, mask, share, generator)
                for name in done.get(node.name, ()):
                    del env[name]
        advance()
    return {s.branch.name: _finished(s) for found in streams.values() for s in found}


def _last_uses(graph: Graph, branches: Sequence[Branch]) -> dict[str, list[str]]:
    """As ``last_uses``, with what a branch's statistics read kept up to its addition."""
    place = {node.name: i for i, node in enumerate(graph.module.graph.nodes)}
    last = {name: node for node, names in last_uses(graph.module).items() for name in names}
    for branch in branches:
        for read in (branch.source, branch.skip):
            last[read.name] = max(last[read.name], branch.add.name, key=place.__getitem__)
    done: dict[str, list[str]] = {}
    for name, node in last.items():
        done.setdefault(node, []).append(name)
    return done


def _record(
    streams: _Streams,
    env: Mapping[str, Any],
    mask: Tensor | None,
    n_batches: int,
    generator: torch.Generator,
) -> None:
    branch = streams.branch
    if branch.value is None:
        value = env[branch.add.name] - env[branch.skip.name]
    else:
        value = env[branch.value.name]
    channels = _by_channel(value, branch.dim, mask)
    streams.total += channels.double().sum(0)
    streams.count += len(channels)
    if not branch.has_map:
        return
    op, source = branch.projection, env[branch.source.name]
    count = len(channels) if op is None else row_count(source, op, mask)
    limit = -(-enough_rows(branch.inputs) // n_batches)
    pick = torch.arange(count)
    if count > limit:
        pick = torch.randperm(count, generator=generator)[:limit].sort().values
    if op is None:
        inputs = _by_channel(source, branch.dim, mask)[pick].unsqueeze(1)
        outputs = channels[pick].unsqueeze(1)
    else:
        inputs, outputs = as_rows(source, op, mask, pick), output_rows(value, op, mask)[pick]
    streams.moments.add_(inputs, residual=outputs)


def _by_channel(value: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """Rows [t, c]; of tokens only the real ones."""
    if mask is not None and value.dim() == 3 and dim == 2 and value.shape[:2] == mask.shape:
        return value[mask]
    return value.movedim(dim, -1).reshape(-1, value.shape[dim])


def _finished(streams: _Streams) -> BranchStatistics:
    moments: Moments | None = streams.moments.value() if streams.branch.has_map else None
    return BranchStatistics(mean=streams.total / max(1, streams.count), moments=moments)
