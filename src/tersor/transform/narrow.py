"""A cut graph takes over what was removed: every weighted op is fitted again, front to back.

Two runs of the calibration samples go side by side: the original graph, and the cut one with the
weights found so far. Each linear or convolution behind a cut is fitted by least squares to what the
original's kept outputs were, on the inputs that the cut model really sees; where its result joins a
residual stream, the stream's own difference is part of the target; where a ReLU follows, the error
behind the ReLU counts (ALGORITHMS 3.2b). Producers are fitted as well as consumers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import NumericalError
from tersor.graph.axes import Axes
from tersor.graph.axes.labels import Flags
from tersor.graph.axes.slicing import cut, gone_from
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, execute, rebuild
from tersor.graph.meta import refresh
from tersor.graph.operators import (
    WeightedOp,
    as_rows,
    grouped_weight,
    output_rows,
    row_count,
    weighted_ops,
)
from tersor.observe.statistics import token_mask
from tersor.ops.rectified import RectifiedRows, fit_rectified

aten = torch.ops.aten
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_RELUS = (aten.relu.default, aten.relu_.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowConfig:
    """How ops are fitted.

    Args:
        damping: Ridge towards the cut weight, relative to the mean diagonal of the covariance.
        iterations: Majorise-minimise steps where a ReLU follows; 0: plain least squares.
        rows: Rows of one fit at most; more change little from 16 an input on.
        values: Values of those rows at most: all passes of a fit read the same rows in memory.
        seed: Of the choice of rows.
        fixed: Ops whose weights stay as they are, though what they read has changed.
    """

    damping: float = 1e-4
    iterations: int = 4
    rows: int = 65536
    values: int = 1 << 27
    seed: int = 0
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The fitted graph, and of each op the share of its target's variance that is lost."""

    graph: Graph
    losses: Mapping[str, float]


@dataclass
class _Batch:
    original: dict[str, Any]
    new: dict[str, Any]
    mask: Tensor | None


@dataclass
class _Fit:
    """What one op is fitted on."""

    op: WeightedOp
    cut_op: WeightedOp
    kept: Tensor  # output channels that stay
    other: fx.Node | None  # the other operand of the addition behind the op
    has_relu: bool
    picks: list[Tensor | None] = field(default_factory=list)


def narrow(
    graph: Graph,
    axes: Axes,
    keep: Mapping[str, Sequence[int]],
    batches: Sequence[tuple[Tensor, ...]],
    config: NarrowConfig = NarrowConfig(),
    advance: Callable[[], None] = lambda: None,
) -> Narrowed:
    """Cut a graph and fit what is left.

    Args:
        graph: The original; not changed.
        axes: Its widths.
        keep: Width -> indices of the units that stay.
        batches: Flat inputs of the calibration part, without labels.
        config: How ops are fitted.
        advance: Called once for each op that was fitted.

    Raises:
        ShapeError: A width that would lose all its units.
        NumericalError: A fit gives values that are not finite.
    """
    removed = axes.removed(gone_from(axes, keep))
    run = _Run(graph, axes, removed, batches, config)
    done = run.done()
    position = 0
    with torch.no_grad():
        for node in run.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                run.feed(node, [flat[position] for flat in batches])
                position += 1
            else:
                run.step(node)
                if run.fit(node):
                    advance()
            run.forget(done.get(node.name, ()))
    return Narrowed(run.result(), run.losses)


class _Run:
    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        removed: Flags,
        batches: Sequence[tuple[Tensor, ...]],
        config: NarrowConfig,
    ) -> None:
        self.graph, self.axes, self.removed, self.config = graph, axes, removed, config
        small = cut(graph, axes, removed)
        fresh, tensors = copy_graph(small.module)
        # Weights are written in place below; what was not cut is still the original's own tensor.
        self.tensors = {name: t.clone() for name, t in tensors.items()}
        self.module = rebuild(fresh, self.tensors, remove_dead=False)
        self.nodes: list[fx.Node] = list(self.module.graph.nodes)
        self.before = {n.name: n for n in graph.module.graph.nodes}
        self.ops = {op.node.name: op for op in weighted_ops(graph.module)}
        self.cut_ops = {op.node.name: op for op in weighted_ops(self.module)}
        self.dirty: set[str] = set()
        self.losses: dict[str, float] = {}
        self.batches = [_Batch({}, {}, token_mask(graph.signature, flat)) for flat in batches]
        self._uses = _use_counts(graph)

    def feed(self, node: fx.Node, values: Sequence[Tensor]) -> None:
        for batch, value in zip(self.batches, values, strict=True):
            batch.original[node.name] = batch.new[node.name] = value

    def step(self, node: fx.Node) -> None:
        """Run a node in both graphs; it is dirty once it differs from the original."""
        name = node.name
        old = self.before.get(name)
        is_dirty = (
            old is None
            or any(s.name in self.dirty for s in node.all_input_nodes)
            or (node.op == "get_attr" and self._is_cut(node))
        )
        for batch in self.batches:
            if old is not None:
                batch.original[name] = execute(self.graph.module, old, batch.original)
            is_own = is_dirty or node.op == "get_attr"  # a fit may write to it
            batch.new[name] = (
                execute(self.module, node, batch.new) if is_own else batch.original[name]
            )
        if is_dirty:
            self.dirty.add(name)

    def _is_cut(self, node: fx.Node) -> bool:
        name = str(node.target)
        shape = self.axes.walk.stored.get(name)
        return shape is not None and [d.size for d in shape] != list(self.tensors[name].shape)

    def done(self) -> dict[str, list[str]]:
        """For each node the values that neither graph needs after it.

        A cut may read a value in a new node in front of the one that reads it in the original.
        """
        last: dict[str, str] = {}
        for node in self.nodes:
            old = self.before.get(node.name)
            for source in (*node.all_input_nodes, *(old.all_input_nodes if old else ())):
                last[source.name] = node.name
        found: dict[str, list[str]] = {}
        for source_name, node_name in last.items():
            found.setdefault(node_name, []).append(source_name)
        return found

    def forget(self, names: Sequence[str]) -> None:
        for batch in self.batches:
            for name in names:
                batch.new.pop(name, None)
                batch.original.pop(name, None)

    def fit(self, node: fx.Node) -> bool:
        """Fit a weighted op behind a cut and run it again."""
        op = self.ops.get(node.name)
        if op is None or node.name not in self.cut_ops or op.kind == "embedding":
            return False
        if node.name in self.config.fixed:
            return False
        if op.data.name not in self.dirty or self._uses[str(op.weight.target)] > 1:
            return False
        fit = self._plan(op)
        weight = self.tensors[str(fit.cut_op.weight.target)]
        groups = 1 if fit.cut_op.window is None else fit.cut_op.window.groups
        fit.picks = [self._pick(batch, fit) for batch in self.batches]
        rows = list(self._rows(fit))
        found = fit_rectified(
            lambda: rows,
            prior=grouped_weight(weight, groups),
            damping=self.config.damping,
            iterations=self.config.iterations if fit.has_relu else 0,
        )
        if not bool(torch.isfinite(found.weight).all()):
            raise NumericalError(f"{node.name}: the refit is not finite; raise the damping")
        self._store(fit, found.weight.reshape(weight.shape), found.bias.reshape(-1))
        self.losses[node.name] = found.losses[found.step]
        for batch in self.batches:
            batch.new[node.name] = execute(self.module, node, batch.new)
        return True

    def _plan(self, op: WeightedOp) -> _Fit:
        name = op.node.name
        dim = self.axes.walk.shapes[op.node][1 if op.window is not None else -1]
        kept = torch.from_numpy(self.axes.kept(dim, self.removed).nonzero()[0])
        users = list(self.before[name].users)
        add = users[0] if len(users) == 1 and users[0].target in _ADDS else None
        other = None
        if add is not None and not add.kwargs:
            others = [a for a in add.args if isinstance(a, fx.Node) and a is not self.before[name]]
            known = [a for a in others if a.name in self.batches[0].new and a.op != "get_attr"]
            other = known[0] if len(known) == 1 else None
        last = add if add is not None and other is not None else self.before[name]
        readers = list(last.users)
        return _Fit(
            op=op,
            cut_op=self.cut_ops[name],
            kept=kept,
            other=other,
            has_relu=len(readers) == 1 and readers[0].target in _RELUS,
        )

    def _pick(self, batch: _Batch, fit: _Fit) -> Tensor | None:
        count = row_count(batch.new[fit.op.data.name], fit.cut_op, batch.mask)
        inputs = self.tensors[str(fit.cut_op.weight.target)][0].numel()
        groups = 1 if fit.cut_op.window is None else fit.cut_op.window.groups
        most = min(self.config.rows, self.config.values // (inputs * groups))
        limit = -(-most // len(self.batches))
        if count <= limit:
            return None
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randperm(count, generator=generator)[:limit].sort().values

    def _rows(self, fit: _Fit) -> Iterator[RectifiedRows]:
        """The op's inputs as the cut model has them, and the original's outputs that stay."""
        for batch, pick in zip(self.batches, fit.picks, strict=True):
            inputs = as_rows(batch.new[fit.op.data.name], fit.cut_op, batch.mask, pick)
            wanted = self._channels(batch.original[fit.op.node.name], fit, batch, pick)
            offset = None
            if fit.other is not None:
                name = fit.other.name
                wanted = wanted + self._channels(batch.original[name], fit, batch, pick)
                shape = output_rows(batch.new[name], fit.cut_op, batch.mask)
                offset = shape if pick is None else shape[pick]
            yield RectifiedRows(inputs=inputs, wanted=wanted, offset=offset)

    def _channels(self, value: Tensor, fit: _Fit, batch: _Batch, pick: Tensor | None) -> Tensor:
        rows = output_rows(value, fit.op, batch.mask)
        rows = rows if pick is None else rows[pick]
        flat = rows.reshape(len(rows), -1)[:, fit.kept]
        groups = 1 if fit.cut_op.window is None else fit.cut_op.window.groups
        return flat.reshape(len(rows), groups, -1)

    def _store(self, fit: _Fit, weight: Tensor, bias: Tensor) -> None:
        op = fit.cut_op
        name = str(op.weight.target)
        self.tensors[name].copy_(weight.to(self.tensors[name].dtype))
        if op.bias is not None and self._uses[str(op.bias.target)] == 1:
            target = str(op.bias.target)
            self.tensors[target].copy_(bias.to(self.tensors[target].dtype))
            return
        fresh = f"{name.removesuffix('.weight')}.refitted_bias".replace("..", ".")
        self.tensors[fresh] = bias.to(self.tensors[name].dtype)
        owner, _, leaf = fresh.rpartition(".")
        self.module.get_submodule(owner).register_buffer(leaf, self.tensors[fresh])
        with self.module.graph.inserting_before(op.node):
            node = self.module.graph.create_node("get_attr", fresh, name=f"{op.node.name}_refit_b")
        args = [*op.node.args, None] if len(op.node.args) == 2 else list(op.node.args)
        args[2] = node
        op.node.args = tuple(args)
        for batch in self.batches:
            batch.new[node.name] = self.tensors[fresh]

    def result(self) -> Graph:
        fresh, tensors = copy_graph(self.module)
        module = rebuild(fresh, tensors)
        refresh(module)
        return replace(self.graph, module=module)


def _use_counts(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            found[str(node.target)] = found.get(str(node.target), 0) + len(node.users)
    return found
