"""A cut graph takes over what was removed: every weighted op is fitted again, front to back.

Two runs of the calibration samples go side by side: the original graph, and the cut one with the
weights found so far, which may have lost branches as well. Each linear or convolution behind a cut is fitted by least squares to what the
original's kept outputs were, on the inputs that the cut model really sees; where its result joins a
residual stream, the stream's own difference is part of the target; where a ReLU follows, the error
behind the ReLU counts (ALGORITHMS 3.2b). Producers are fitted as well as consumers. What gives the
logits of a classifier is fitted to the original's probabilities.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import NumericalError
from tersor.core.records import OutputKind
from tersor.graph.axes import Axes
from tersor.graph.axes.labels import Flags
from tersor.graph.axes.matching import counterparts
from tersor.graph.axes.slicing import cut, gone_from
from tersor.graph.bends import ceiling_behind
from tersor.graph.contracts import Graph
from tersor.graph.edit import (
    copy_graph,
    execute,
    literals,
    parameters_by_name,
    rebuild,
    stored_uses,
)
from tersor.graph.meta import refresh
from tersor.graph.mutation import has_mutation
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
from tersor.ops.softmax import fit_softmax
from tersor.transform.calls import Calls, Step, in_step, merged, others_of, shared_calls
from tersor.transform.prefixes import Chain, Fitted, Prefixes, Segments, State

# Of the fit of a classifier: it is flat after so many steps, and takes half a minute at most.
_SOFTMAX_STEPS, _SOFTMAX_MACS, _SOFTMAX_ROWS = 100, 1e11, 64


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
        kind: What the outputs mean. Linear maps that give logits, a row a sample, are fitted to the
            original's softmax; None or another kind: least squares.
    """

    damping: float = 1e-4
    iterations: int = 4
    rows: int = 65536
    values: int = 1 << 27
    seed: int = 0
    fixed: frozenset[str] = frozenset()
    kind: OutputKind | None = None


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

    op: WeightedOp  # of the original
    cut_op: WeightedOp
    kept: Tensor  # output channels that stay
    rows: list[tuple[int, Tensor]]  # (another dimension of the result, what stays of it)
    other: fx.Node | None  # the original's other operand of the addition behind the op
    is_gone: bool  # the new graph does not have that operand: the op takes over all of it
    ceiling: float | None  # of the ReLU that follows; None: another op does


def narrow(  # noqa: PLR0913 - the stage's inputs
    graph: Graph,
    axes: Axes,
    keep: Mapping[str, Sequence[int]],
    batches: Sequence[tuple[Tensor, ...]],
    config: NarrowConfig = NarrowConfig(),
    advance: Callable[[], None] = lambda: None,
    *,
    base: Graph | None = None,
    prefixes: Prefixes | None = None,
) -> Narrowed:
    """Cut a graph and fit what is left.

    Args:
        graph: The original, whose outputs are wanted; not changed.
        axes: Widths of it, or of what replaced branches left of it, where nodes keep their names.
        keep: Width -> indices of the units that stay.
        batches: Flat inputs of the calibration part, without labels.
        config: How ops are fitted.
        advance: Called once for each op that was fitted.
        base: What is cut in place of the graph of ``axes``: the same nodes with other weights, as
            where heads were turned, in ``graph`` as well.
        prefixes: Of earlier fits of this model on these batches: what they have in common with this one is not
            done again. Gets this one's; the result is the same, to the bit.

    Raises:
        ShapeError: A width that would lose all its units.
        NumericalError: A fit gives values that are not finite.
    """
    removed = axes.removed(gone_from(axes, keep))
    small = cut(base or axes.graph, axes, removed)
    run = _Run(graph, axes, removed, (small, batches), config)
    is_pure = not has_mutation(graph.module.graph) and not has_mutation(small.module.graph)
    with torch.no_grad():
        start = run.resume(prefixes) if prefixes is not None and is_pure else 0
        for _ in run.losses:  # fitted by the run whose beginning this is
            advance()
        for i, step in enumerate(run.steps[start:], start):
            run.step(step)
            if step.is_new and run.fit(step.node):
                advance()
            run.forget(i)
            run.keep(i)
    return Narrowed(run.result(), run.losses)


class _Run:
    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        removed: Flags,
        work: tuple[Graph, Sequence[tuple[Tensor, ...]]],
        config: NarrowConfig,
    ) -> None:
        small, batches = work
        self.graph, self.axes, self.removed, self.config = graph, axes, removed, config
        fresh, tensors = copy_graph(small.module)
        # Weights are written in place below; what was not cut is still the original's own tensor.
        self.tensors = {name: t.clone() for name, t in tensors.items()}
        self.module = rebuild(fresh, self.tensors, remove_dead=False)
        self.before = {n.name: n for n in graph.module.graph.nodes}
        self.after = {n.name: n for n in self.module.graph.nodes}
        self.stored = parameters_by_name(graph.module)
        self.ops = {op.node.name: op for op in weighted_ops(graph.module)}
        self.whole_ops = {op.node.name: op for op in weighted_ops(axes.graph.module)}
        self.cut_ops = {op.node.name: op for op in weighted_ops(self.module)}
        self.dirty: set[str] = set()
        self.losses: dict[str, float] = {}
        self.fitted: list[Fitted] = []
        self._segments: Segments | None = None
        self.inputs = batches
        self.batches = [_Batch({}, {}, token_mask(graph.signature, flat)) for flat in batches]
        self.left = counterparts(axes, removed)
        nodes = (*graph.module.graph.nodes, *self.module.graph.nodes)
        self._held = {node.name for node in nodes if node.op == "get_attr"}
        self._uses = stored_uses(self.module)
        order, self.calls = shared_calls(self.cut_ops, self._uses, list(self.module.graph.nodes))
        before = in_step(list(graph.module.graph.nodes), self.calls)
        self.steps = merged(before, order, self.calls)
        self._last = self._last_uses()
        self._done: dict[int, list[tuple[bool, str]]] = {}
        for value, i in self._last.items():
            self._done.setdefault(i, []).append(value)

    def step(self, step: Step) -> None:
        """Run a node; one of the new graph is dirty once it differs from the original."""
        node, name = step.node, step.node.name
        if not step.is_new:
            for flat, batch in zip(self.inputs, self.batches, strict=True):
                is_input = step.place >= 0
                batch.original[name] = (
                    flat[step.place]
                    if is_input
                    else execute(self.graph.module, node, batch.original)
                )
            return
        is_dirty = self._is_dirty(node)
        if is_dirty and self.calls.get(name, (name,)) == (name,) and self._fitted_at(node):
            self.dirty.add(name)  # its fit runs it
            return
        is_own = is_dirty or node.op == "get_attr"  # a fit may write to it
        for batch in self.batches:
            batch.new[name] = (
                execute(self.module, node, batch.new) if is_own else batch.original[name]
            )
        if is_dirty:
            self.dirty.add(name)

    def _is_dirty(self, node: fx.Node) -> bool:
        old = self.before.get(node.name)
        if old is None or any(s.name in self.dirty for s in node.all_input_nodes):
            return True
        if node.op != "get_attr":
            return literals(old) != literals(node)  # sizes in them may be the cut ones
        mine, whole = self.tensors[str(node.target)], self.stored.get(str(node.target))
        return whole is None or mine.shape != whole.shape or not torch.equal(mine, whole)

    def _last_uses(self) -> dict[tuple[bool, str], int]:
        """The last step that needs a value: (of the new graph, name) -> its place."""
        last: dict[tuple[bool, str], int] = {}
        for i, step in enumerate(self.steps):
            used = [(step.is_new, source.name) for source in step.node.all_input_nodes]
            calls = self.calls.get(step.node.name, (step.node.name,))
            if step.is_new and calls[-1] == step.node.name:
                used += [(True, s.name) for c in calls for s in self.after[c].all_input_nodes]
                for old in [self.before[name] for name in calls if name in self.before]:
                    used += [(False, old.name), *((False, other.name) for other in others_of(old))]
            last |= dict.fromkeys(used, i)
        return last

    def resume(self, prefixes: Prefixes) -> int:
        """Take over the longest beginning that a run before had in common; the first step that is left."""
        keys = self._keys()
        self._segments = Segments(prefixes, keys)
        found = prefixes.latest(keys, self._suits)
        if found is None:
            return 0
        place, state = found
        for batch, original, new in zip(self.batches, state.original, state.new, strict=True):
            batch.original, batch.new = dict(original), dict(new)
        self.dirty = set(state.dirty)
        for step in self.steps[: place + 1]:  # stored tensors, which a graph may have all in front
            if step.node.op == "get_attr":
                self.step(step)
        for each in state.fitted:
            self._store([self.cut_ops[name] for name in each.calls], each.weight, each.bias)
            self._note(each)
        return place + 1

    def _keys(self) -> list[str]:
        chain = Chain(self.config)
        for i, step in enumerate(self.steps):
            node, name = step.node, step.node.name
            read: list[object] = [step.is_new, step.place, name, node.op, literals(node)]
            stored = self.tensors if step.is_new else self.stored
            targets = [str(s.target) for s in node.all_input_nodes if s.op == "get_attr"]
            for target in targets:  # here and not where they stand, so that only readers differ
                read += [stored[target], self._uses.get(target)]
            if step.is_new and name in self.cut_ops and name in self.ops:
                read += self._read_by_fit(i, self.ops[name])
            chain.add(*read)
        return chain.keys

    def _read_by_fit(self, place: int, op: WeightedOp) -> list[object]:
        """What a fit reads beside values and tensors: what stays, and what goes on with its result."""
        others = [other.name for other in others_of(op.node)]
        users = [user.name for user in op.node.users]
        fit = self._plan(op)
        return [
            self.calls.get(op.node.name),
            fit.kept,
            *(part for row in fit.rows for part in row),
            others,
            [
                self._last.get((is_new, name), -1) >= place
                for is_new in (False, True)
                for name in others
            ],
            [name in self.after for name in (*others, *users)],
        ]

    def _suits(self, place: int, state: State) -> bool:
        """Whether a state has every value that a step behind it reads."""
        for step in self.steps[: place + 1]:
            name = step.node.name
            is_read = self._last.get((step.is_new, name), -1) > place
            values = state.new if step.is_new else state.original
            if is_read and step.node.op != "get_attr" and name not in values[0]:
                return False
        return True

    def keep(self, place: int) -> None:
        """Offer the state behind a step to later runs."""
        if self._segments is None:
            return
        first = self.batches[0]  # tells which state holds the least
        live = self._live(first.original), self._live(first.new)
        self._segments.offer(place, live, self._state)

    def _live(self, values: dict[str, Any]) -> dict[str, Any]:
        """What is there beside stored tensors, which belong to a run: a fit writes to those that only ops read."""
        return {name: value for name, value in values.items() if name not in self._held}

    def _state(self) -> State:
        return State(
            original=tuple(self._live(b.original) for b in self.batches),
            new=tuple(self._live(b.new) for b in self.batches),
            dirty=frozenset(self.dirty - self._held),
            fitted=tuple(self.fitted),
        )

    def _note(self, found: Fitted) -> None:
        self.fitted.append(found)
        self.losses |= dict.fromkeys(found.calls, found.loss)

    def forget(self, place: int) -> None:
        """Let go of what nothing needs after a step."""
        for is_new, name in self._done.get(place, ()):
            for batch in self.batches:
                (batch.new if is_new else batch.original).pop(name, None)

    def fit(self, node: fx.Node) -> bool:
        """Fit a weighted op behind a cut and run it again."""
        calls = self._fitted_at(node)
        if not calls:
            return False
        fits = [self._plan(self.ops[name]) for name in calls]
        fit = fits[0]
        weight = self.tensors[str(fit.cut_op.weight.target)]
        groups = 1 if fit.cut_op.window is None else fit.cut_op.window.groups
        rows = [part for each in fits for part in self._rows(each)]
        if any(each.ceiling != fit.ceiling for each in fits):
            fit.ceiling = None
        found = fit_rectified(
            lambda: rows,
            prior=grouped_weight(weight, groups),
            damping=self.config.damping,
            iterations=0 if fit.ceiling is None else self.config.iterations,
            ceiling=fit.ceiling or math.inf,
        )
        solved = found.weight.reshape(weight.shape), found.bias.reshape(-1)
        if len(fits) == 1 and self._gives_logits(fit):
            solved = self._classifier(rows, solved)
        if not bool(torch.isfinite(solved[0]).all()):
            raise NumericalError(f"{node.name}: the refit is not finite; raise the damping")
        self._store([each.cut_op for each in fits], *solved)
        loss = found.losses[found.step]
        dtype = weight.dtype
        self._note(
            Fitted(calls=calls, weight=solved[0].to(dtype), bias=solved[1].to(dtype), loss=loss)
        )
        for name in calls:
            self.dirty.add(name)
            for batch in self.batches:
                batch.new[name] = execute(self.module, self.after[name], batch.new)
        return True

    def _fitted_at(self, node: fx.Node) -> Calls:
        """The calls of a weight that is fitted when a node has run; empty: none is."""
        calls = self.calls.get(node.name, (node.name,))
        if calls[-1] != node.name or not all(c in self.ops and c in self.cut_ops for c in calls):
            return ()
        ops = [self.ops[name] for name in calls]
        if any(op.kind == "embedding" or op.node.name in self.config.fixed for op in ops):
            return ()
        if self._uses[str(ops[0].weight.target)] > len(calls):
            return ()
        if not any(op.data.name in self.dirty for op in ops):
            return ()
        # Else a map in a branch's place, fitted already to what the branch gave.
        is_same = all(self.cut_ops[op.node.name].data.name == op.data.name for op in ops)
        return calls if is_same else ()

    def _gives_logits(self, fit: _Fit) -> bool:
        if self.config.kind != "logits" or fit.other is not None or fit.op.kind != "linear":
            return False
        is_output = all(reader.op == "output" for reader in fit.op.node.users)
        return is_output and self.batches[0].original[fit.op.node.name].dim() == 2

    def _classifier(
        self, rows: Sequence[RectifiedRows], start: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([part.inputs[:, 0] for part in rows])
        wanted = torch.cat([part.wanted[:, 0] for part in rows])
        products = 6.0 * inputs.numel() * wanted.shape[1]  # of one look at value and gradient
        iterations = min(_SOFTMAX_STEPS, int(_SOFTMAX_MACS / products))
        if len(inputs) < _SOFTMAX_ROWS or iterations < 1:
            return start
        damping = self.config.damping
        found = fit_softmax(inputs, wanted, *start, damping=damping, iterations=iterations)
        return found.weight, found.bias

    def _plan(self, op: WeightedOp) -> _Fit:
        name, other = op.node.name, self._other(op.node)
        shape = self.axes.walk.shapes[self.whole_ops[name].node]
        channel = 1 if op.window is not None else len(shape) - 1
        return _Fit(
            op=op,
            cut_op=self.cut_ops[name],
            kept=torch.from_numpy(self.axes.kept(shape[channel], self.removed).nonzero()[0]),
            rows=[part for part in self.left.kept[name] if part[0] != channel],
            other=other,
            is_gone=other is not None and other.name not in self.after,
            ceiling=ceiling_behind(op.node if other is None else next(iter(op.node.users))),
        )

    def _other(self, node: fx.Node) -> fx.Node | None:
        """What an addition adds to a node's result, where both are at hand.

        Also what it adds no more, once the addition is gone with it; where a constant has come in
        its place, the op goes on without it.
        """
        others = others_of(node)
        if len(others) != 1 or others[0].name not in self.batches[0].original:
            return None
        is_added = next(iter(node.users)).name in self.after
        return others[0] if (others[0].name in self.batches[0].new) == is_added else None

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
        for batch in self.batches:
            pick = self._pick(batch, fit)
            inputs = as_rows(batch.new[fit.op.data.name], fit.cut_op, batch.mask, pick)
            wanted = self._channels(batch.original[fit.op.node.name], fit, batch, pick)
            offset = None
            if fit.other is not None:
                wanted = wanted + self._channels(batch.original[fit.other.name], fit, batch, pick)
            if fit.other is not None and not fit.is_gone:
                rows = output_rows(batch.new[fit.other.name], fit.cut_op, batch.mask)
                offset = rows if pick is None else rows[pick]
            yield RectifiedRows(inputs=inputs, wanted=wanted, offset=offset)

    def _channels(self, value: Tensor, fit: _Fit, batch: _Batch, pick: Tensor | None) -> Tensor:
        for dim, index in fit.rows:  # a width may be what another op has as its tokens
            value = value.index_select(dim, index)
        rows = output_rows(value, fit.op, batch.mask)
        rows = rows if pick is None else rows[pick]
        flat = rows.reshape(len(rows), -1)[:, fit.kept]
        groups = 1 if fit.cut_op.window is None else fit.cut_op.window.groups
        return flat.reshape(len(rows), groups, -1)

    def _store(self, ops: Sequence[WeightedOp], weight: Tensor, bias: Tensor) -> None:
        op = ops[0]
        name = str(op.weight.target)
        self.tensors[name].copy_(weight)
        if op.bias is not None and self._uses[str(op.bias.target)] == len(ops):
            self.tensors[str(op.bias.target)].copy_(bias)
            return
        stem = name.removesuffix(".weight")  # a parameter by itself is no module to hold another
        fresh = f"{name}_refitted_bias" if stem == name else f"{stem}.refitted_bias"
        self.tensors[fresh] = bias.to(self.tensors[name].dtype)
        owner, _, leaf = fresh.rpartition(".")
        self.module.get_submodule(owner).register_buffer(leaf, self.tensors[fresh])
        for op in ops:
            with self.module.graph.inserting_before(op.node):
                node = self.module.graph.create_node(
                    "get_attr", fresh, name=f"{op.node.name}_refit_b"
                )
            args = [*op.node.args, None] if len(op.node.args) == 2 else list(op.node.args)
            args[2] = node
            op.node.args = tuple(args)
            for batch in self.batches:
                batch.new[node.name] = self.tensors[fresh]
            self._held.add(node.name)

    def result(self) -> Graph:
        fresh, tensors = copy_graph(self.module)
        module = rebuild(fresh, tensors)
        refresh(module)
        return replace(self.graph, module=module)
