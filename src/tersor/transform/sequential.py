"""A plan becomes a compressed graph, front to back.

Two runs of the calibration samples go through the graph side by side, node by node: the original
and the compressed one. At each site of the plan the method sees the statistics of the compressed
prefix, against the original outputs (with the difference of the residual stream included), and
its change takes effect before the next node runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import NumericalError
from tersor.core.records import Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import (
    ActivationStatistics,
    AddStatistics,
    Graph,
    Method,
    Readers,
    Rows,
    SiteChange,
    SiteStatistics,
    TensorMap,
)
from tersor.graph.edit import execute, last_uses
from tersor.graph.factors import run_chain
from tersor.graph.mutation import has_mutation
from tersor.graph.operators import (
    WeightedOp,
    as_rows,
    output_rows,
    row_count,
    weighted_ops,
)
from tersor.graph.quantizer import restored, rounded
from tersor.observe.activations import (
    activation_readers,
    activation_statistics_of,
    kept_rows,
    rows_of_batch,
)
from tersor.observe.assumed import assumed_moments
from tersor.observe.output_moments import Felt, moment_at
from tersor.observe.statistics import channel_rows, op_bias, op_weight, some_rows, token_mask
from tersor.observe.streams import Histogram, MomentStream, RowSample
from tersor.ops.activations import cheaper
from tersor.ops.moments import Moments, add_moments

aten = torch.ops.aten

_CHANNEL_ROWS = 2048
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_LEAST_VARIANCE = 1e-3  # of the mean: padding-like rows must not own the fit either
_AGREE = 1e-4  # the side-by-side run and the edited graph, of the output's scale


@dataclass(frozen=True, slots=True)
class Transformed:
    """The compressed graph and the changes that made it."""

    graph: Graph
    changes: tuple[SiteChange, ...]


@dataclass
class _Pair:
    """Values of one batch in both runs."""

    original: dict[str, Any]
    compressed: dict[str, Any]
    mask: Tensor | None


class _Run:
    """Both runs of all batches, and what is known so far."""

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[tuple[Tensor, ...]],
        readers: Mapping[str, Readers],
        sites: Sequence[Site],
        felt: Felt,
    ) -> None:
        self.graph, self.felt = graph, felt
        self.sites = {
            op: s
            for s in sites
            if s.pinned is None and s.op_kind in ("linear", "conv") and s.tensor is not None
            for op in s.ops
        }
        self.readers = readers
        self.ops = {op.node.name: op for op in weighted_ops(graph.module)}
        self.dirty: set[str] = set()
        self.writes = has_mutation(graph.module.graph)  # then the runs share no values
        self.pairs = [_Pair({}, {}, token_mask(graph.signature, flat)) for flat in batches]
        self.corrected: dict[str, SiteChange] = {}  # reader -> the change of its activation
        self._tensors: dict[str, dict[str, Any]] = {}

    def step(self, node: fx.Node, values: Sequence[Tensor] | None) -> None:
        """Run an unchanged node in both runs."""
        is_dirty = self.writes or any(s.name in self.dirty for s in node.all_input_nodes)
        for index, pair in enumerate(self.pairs):
            if values is not None:
                fresh = [values[index].clone() if self.writes else values[index] for _ in range(2)]
                pair.original[node.name], pair.compressed[node.name] = fresh
                continue
            pair.original[node.name] = execute(self.graph.module, node, pair.original)
            if node.name in self.corrected:  # and changed by nothing else
                op, change = self.ops[node.name], self.corrected[node.name]
                pair.compressed[node.name] = _run_change(
                    self.graph, node, op, change, pair.compressed
                )
                continue
            pair.compressed[node.name] = (
                execute(self.graph.module, node, pair.compressed)
                if is_dirty
                else pair.original[node.name]
            )
        if is_dirty:
            self.dirty.add(node.name)

    def forget(self, names: Sequence[str]) -> None:
        """Drop values that nobody needs any more."""
        for pair in self.pairs:
            for name in names:
                pair.original.pop(name, None)
                pair.compressed.pop(name, None)

    def statistics(self, site: Site, op: WeightedOp, seed: int) -> SiteStatistics:
        """Statistics of the compressed prefix at a site."""
        tensor = self._tensor_statistics(op, seed)
        readers = self.readers.get(site.tensor or "")
        return SiteStatistics(
            weight=op_weight(self.graph, op),
            bias=op_bias(self.graph, op),
            moments=lambda: add_moments(*self._moments(op, _same, _same, seed)),
            channels=tensor["channels"],
            counts=tensor["histogram"].counts,
            edges=tensor["histogram"].edges(),
            low=tensor["histogram"].low,
            high=tensor["histogram"].high,
            rows=lambda: self._rows(op),
            readers=readers,
            is_padded=readers is not None and readers.is_padded,
            channel_dim=op.channel_dim,
            window=op.window,
            moments_of=lambda new, old: self._moments(op, new, old, seed),
            assumed=lambda: assumed_moments(self.graph, op),
            output_moment=lambda: moment_at(site.ops, self.felt),
        )

    def _tensor_statistics(self, op: WeightedOp, seed: int) -> dict[str, Any]:
        """Histogram and channel sample of a tensor: one for all its readers."""
        name = op.data.name
        if name not in self._tensors:
            generator = torch.Generator().manual_seed(seed)
            histogram = Histogram()
            sample = RowSample(_CHANNEL_ROWS, len(self.pairs))
            for pair in self.pairs:
                values = channel_rows(pair.compressed[name], op, pair.mask)
                histogram.add_(values)
                sample.add_(values[sample.pick(len(values), generator)])
            self._tensors[name] = {"histogram": histogram, "channels": sample.value()}
        return self._tensors[name]

    def _moments(
        self, op: WeightedOp, new: TensorMap, old: TensorMap, seed: int
    ) -> tuple[Moments, Moments]:
        """Moments of the even and of the odd batches; of half of the rows each for one batch."""
        generator = torch.Generator().manual_seed(seed)
        halves = (MomentStream(), MomentStream())
        name = op.data.name
        other = _residual_operand(op.node, self.dirty)
        for index, pair in enumerate(self.pairs):
            data, count = pair.compressed[name], row_count(pair.compressed[name], op, pair.mask)
            keep = some_rows(data, op, pair.mask, len(self.pairs), generator)
            rows = as_rows(new(data), op, pair.mask, keep)
            before = as_rows(old(pair.original[name]), op, pair.mask, keep)
            difference = None
            if other is not None and other in pair.original:
                gap = pair.original[other] - pair.compressed[other]
                difference = _matching(gap, op, pair.mask, count)
            weights = self._row_weights(op, pair)
            if keep is not None:
                difference = None if difference is None else difference[keep]
                weights = None if weights is None else weights[keep]
            if weights is not None:
                weights = weights / weights.mean()
            if len(self.pairs) > 1:
                halves[index % 2].add_(rows, before, difference, weights)
                continue
            for half, stream in enumerate(halves):
                part = slice(half, None, 2)
                stream.add_(
                    rows[part],
                    before[part],
                    None if difference is None else difference[part],
                    None if weights is None else weights[part],
                )
        return halves[0].value(), halves[1].value()

    def _row_weights(self, op: WeightedOp, pair: _Pair) -> Tensor | None:
        """1 / variance of what a layer norm behind the op divides by its deviation.

        Without them the few tokens with massive activations would own the least squares, though
        the norm makes all tokens alike.
        """
        add = _add_before_norm(op.node)
        if add is None or op.window is not None:
            return None
        total = execute(self.graph.module, op.node, pair.original)
        other = _other_operand(add, op.node)
        if other is not None:
            if other not in pair.original:
                return None
            total = total + pair.original[other]
        if total.dim() < 2:
            return None
        rows = output_rows(total, op, pair.mask)[:, 0].double()
        variance = rows.var(1, correction=0)
        return 1.0 / variance.clamp_min(_LEAST_VARIANCE * float(variance.mean()) + 1e-30)

    def _rows(self, op: WeightedOp) -> Rows:
        pair = self.pairs[0]
        original = as_rows(pair.original[op.data.name], op, pair.mask)
        compressed = as_rows(pair.compressed[op.data.name], op, pair.mask)
        # An addition asks for a layer that is still to come: its weight has no value yet.
        stored = {
            a.name: execute(self.graph.module, a, {})
            for a in op.node.all_input_nodes
            if a.op == "get_attr"
        }
        output = execute(self.graph.module, op.node, {**pair.original, **stored})
        return Rows(
            original=original, compressed=compressed, output=output_rows(output, op, pair.mask)
        )

    def addition(self, node: fx.Node, own: Sequence[str], seed: int) -> AddStatistics:
        """What quantisers of an addition's operands are chosen from, on the compressed prefix."""
        operands = {a.name for a in node.all_input_nodes}
        shared: dict[str, SiteStatistics] = {}
        for name, op in self.ops.items():
            reader = self.sites.get(name)
            if op.data.name in operands and reader is not None and op.data.name not in shared:
                shared[op.data.name] = self.statistics(reader, op, seed)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for tensor in own:
            histogram = Histogram()
            for pair in self.pairs:
                histogram.add_(pair.compressed[tensor])
            found[tensor] = (histogram.counts, histogram.edges())
        return AddStatistics(shared=shared, own=found)

    def activation(self, node: fx.Node, seed: int) -> ActivationStatistics:
        """What an activation's replacement is fitted to; the same rows of both runs."""
        op, source = activation_readers(self.graph)[node], node.all_input_nodes[0].name
        most = rows_of_batch(self.graph, op, len(self.pairs))

        def rows(side: str) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            values = [(getattr(pair, side)[source], pair.mask) for pair in self.pairs]
            return torch.cat([kept_rows(v, op, mask, most, generator) for v, mask in values])

        return activation_statistics_of(
            self.graph, node, op, lambda: rows("original"), lambda: rows("compressed")
        )

    def known(
        self, site: Site, node: fx.Node, own: Sequence[str], seed: int
    ) -> SiteStatistics | AddStatistics | ActivationStatistics:
        """What a method is told at a site: of a layer, an activation, or an addition's operands."""
        if site.op_kind == "add":
            return self.addition(node, own, seed)
        if site.op_kind == "activation":
            return self.activation(node, seed)
        return self.statistics(site, self.ops[node.name], seed)

    def replace(self, node: fx.Node, change: SiteChange) -> None:
        """Run a changed node: the original in one run, the change in the other."""
        for pair in self.pairs:
            pair.original[node.name] = execute(self.graph.module, node, pair.original)
            if change.site.op_kind == "activation":
                source = pair.compressed[node.all_input_nodes[0].name]
                pair.compressed[node.name] = cheaper(source, str(change.level), change.factor)
                (reader,) = node.users
                self.corrected[reader.name] = change
                continue
            if change.site.op_kind != "add":
                op = self.ops[node.name]
                changed = _run_change(self.graph, node, op, change, pair.compressed)
                pair.compressed[node.name] = changed
                continue
            rounded_ones = {t: restored(pair.compressed[t], q) for t, q in change.operands.items()}
            seen = {**pair.compressed, **rounded_ones}
            pair.compressed[node.name] = execute(self.graph.module, node, seen)
        self.dirty.add(node.name)


def _same(x: Tensor) -> Tensor:
    return x


def _residual_operand(node: fx.Node, dirty: set[str]) -> str | None:
    """The other operand of the add that alone uses a node, if the prefix changed it."""
    users = list(node.users)
    if len(users) != 1 or not _is_add(users[0]):
        return None
    other = _other_operand(users[0], node)
    return other if other in dirty else None


def _is_add(node: fx.Node) -> bool:
    return node.target in (aten.add.Tensor, aten.add_.Tensor) and not node.kwargs


def _other_operand(add: fx.Node, node: fx.Node) -> str | None:
    if add is node:
        return None
    others = [a for a in add.args if isinstance(a, fx.Node) and a is not node]
    return others[0].name if len(others) == 1 else None


def _add_before_norm(node: fx.Node) -> fx.Node | None:
    """What a layer norm reads of an op: the op itself, or the residual add behind it."""
    for candidate in (node, *[u for u in node.users if _is_add(u)]):
        if any(user.target in _NORMS for user in candidate.users):
            return candidate
    return None


def _matching(gap: Tensor, op: WeightedOp, mask: Tensor | None, rows: int) -> Tensor | None:
    """The residual's difference as rows, where it has the op's own shape."""
    value = output_rows(gap, op, mask)
    return value if len(value) == rows else None


def _run_change(
    graph: Graph, node: fx.Node, op: WeightedOp, change: SiteChange, env: Mapping[str, Any]
) -> Tensor:
    if change.factors:
        return _finite(run_chain(env[op.data.name], change), change)
    other = dict(env)
    if change.codes is not None and change.scale is not None:
        shape = [-1] + [1] * (change.codes.dim() - 1)
        other[op.weight.name] = change.codes.float() * change.scale.float().reshape(shape)
    elif (weight := change.float_weight()) is not None:
        other[op.weight.name] = weight
    if change.quantizer is not None:
        quantizer = change.quantizer
        other[op.data.name] = rounded(env[op.data.name], quantizer) + quantizer.shift
    if change.bias is None or op.kind == "embedding":
        value = execute(graph.module, node, other)
    else:
        args = [*node.args, None] if len(node.args) == 2 else list(node.args)
        args[2] = None
        loaded = fx.map_arg(tuple(args), lambda n: other[n.name])
        value = node.target(*loaded, **node.kwargs)  # type: ignore[operator]
        dim = -1 if op.window is None else 1
        shape = [1] * value.dim()
        shape[dim] = -1
        value = value + change.bias.to(value.dtype).reshape(shape)
    return _finite(value, change)


def _finite(value: Tensor, change: SiteChange) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise NumericalError(
            f"{change.site.name}: the {change.level} form gives values that are not finite; "
            "keep it with keep=(...)"
        )
    return value


def transform(  # noqa: PLR0913 - the stage's inputs, each a record or a callable
    graph: Graph,
    sites: Sequence[Site],
    chosen: Mapping[str, Candidate],
    methods: Mapping[str, Method],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    readers: Mapping[str, Readers],
    embedding: Callable[[Site], SiteStatistics],
    seed: int,
    own: Mapping[str, Sequence[str]] | None = None,
    felt: Felt = dict,
    advance: Callable[[], None] = lambda: None,
) -> Transformed:
    """Apply the chosen candidates front to back on the calibration samples.

    Args:
        graph: The original; not changed.
        sites: All sites.
        chosen: Candidate by site name; sites that are absent stay.
        methods: By name.
        batches: Flat inputs of the calibration part.
        readers: What is true of all readers of a tensor, by tensor.
        embedding: Statistics of an embedding site.
        seed: Of the subsampling.
        own: Addition -> operands that nothing else reads, which get quantisers of their own.
        felt: Calls up the original's output's gradient moments by op.
        advance: Called once for each site that is done.

    Raises:
        NumericalError: A change gives values that are not finite.
    """
    run = _Run(graph, batches, readers, sites, felt)
    by_op = {name: site for site in sites if site.name in chosen for name in site.ops}
    changes: dict[str, SiteChange] = {}
    done = last_uses(graph.module)
    position = 0
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "output":
                break
            site = by_op.get(node.name)
            if node.op == "placeholder":
                run.step(node, [flat[position] for flat in batches])
                position += 1
            elif site is None:
                run.step(node, None)
            else:
                if site.name not in changes:
                    known = (
                        embedding(site)
                        if site.op_kind == "embedding"
                        else run.known(site, node, (own or {}).get(site.name, ()), seed)
                    )
                    candidate = chosen[site.name]
                    changes[site.name] = methods[candidate.method].apply(site, candidate, known)
                    advance()
                run.replace(node, changes[site.name])
            run.forget(done.get(node.name, ()))
    result = apply(graph, [c for c in changes.values() if _edits(c)])
    return Transformed(result, tuple(changes.values()))


def _edits(change: SiteChange) -> bool:
    tensors = (change.codes, change.weight, change.packed, change.bias)
    is_edited = any(t is not None for t in tensors)
    is_activation = change.site.op_kind == "activation"
    return is_edited or is_activation or bool(change.operands) or bool(change.factors)
