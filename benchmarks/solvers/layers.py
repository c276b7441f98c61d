"""The layers of a model as problems for a solver, and the model with the solutions in their places."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from tersor.analyse.calibration import embedding_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.records import Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange, SiteStatistics
from tersor.graph.edit import attribute, execute, last_uses
from tersor.graph.operators import as_rows, weighted_ops
from tersor.observe.statistics import op_bias, op_weight, some_rows, token_mask
from tersor.observe.streams import MomentStream, RowSample
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.moments import Moments, add_moments, centred, means, second_moment
from tersor.ops.refit import bias_shift, layer_loss
from tersor.transform.sequential import transform

ROWS = 4096  # calibration rows kept for methods that learn from rows
Batches = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight and what is known of its input.

    Attributes:
        name: Of the site.
        weight: [1, m, n] float64.
        kernel: Of a convolution; () for a linear layer.
        halves: Moments of the calibration rows, in two halves behind a compressed prefix.
        rows: Some calibration rows [t, n]; None behind a compressed prefix.
    """

    name: str
    weight: Tensor
    kernel: tuple[int, ...]
    halves: tuple[Moments, ...]
    rows: Tensor | None = None

    @cached_property
    def moments(self) -> Moments:
        """Of all calibration rows."""
        return reduce(add_moments, self.halves)

    @cached_property
    def second_moment(self) -> Tensor:
        """E[x x^T] [1, n, n]: the metric of methods that know of no bias."""
        return second_moment(self.moments)

    @cached_property
    def covariance(self) -> Tensor:
        """The metric where the bias takes up the mean."""
        return centred(self.moments)[0]

    @cached_property
    def target(self) -> Tensor:
        """The weight to approach: refitted behind a compressed prefix, where that holds on other samples."""
        return cross_fitted(self.weight, self.halves)[0]

    def some_rows(self) -> Tensor:
        """Rows, for methods that learn from them."""
        if self.rows is None:
            raise ValueError(f"{self.name}: no rows are kept behind a compressed prefix")
        return self.rows


Solve = Callable[[Layer], Tensor]


def collect(graph: Graph, batches: Batches, seed: int) -> dict[str, tuple[Moments, Tensor]]:
    """Op -> moments and some rows of its input, in one pass."""
    ops = {op.node.name: op for op in weighted_ops(graph.module) if op.kind != "embedding"}
    streams = {name: (MomentStream(), RowSample(ROWS, len(batches))) for name in ops}
    generator, done = torch.Generator().manual_seed(seed), last_uses(graph.module)
    for flat in batches:
        mask, stream = token_mask(graph.signature, flat), iter(flat)
        env: dict[str, object] = {}
        with torch.no_grad():
            for node in graph.module.graph.nodes:
                is_input = node.op == "placeholder"
                env[node.name] = next(stream) if is_input else execute(graph.module, node, env)
                if node.name in ops:
                    op, (moments, sample) = ops[node.name], streams[node.name]
                    data = env[op.data.name]
                    assert isinstance(data, Tensor)
                    keep = some_rows(data, op, mask, len(batches), generator)
                    rows = as_rows(data, op, mask, keep)
                    moments.add_(rows)
                    sample.add_(rows[sample.pick(len(rows), generator)])
                for name in done.get(node.name, ()):
                    del env[name]
    return {name: (m.value(), r.value()[:, 0]) for name, (m, r) in streams.items()}


class Subject:
    """A captured model, its layers, and how good it is with other weights.

    Args:
        graph: Of the model.
        calibration: Flat inputs.
        held: Flat inputs of held-out samples, for the errors of layers.
        judge: Of a graph: measures of the whole model.
        seed: Of the subsampling of rows.
    """

    def __init__(
        self,
        graph: Graph,
        calibration: Batches,
        held: Batches,
        judge: Callable[[Graph], Mapping[str, float]],
        seed: int,
    ) -> None:
        self.graph, self.calibration, self.judge, self.seed = graph, calibration, judge, seed
        self.sites = {
            s.ops[0]: s for s in find_sites(graph) if s.op_kind != "embedding" and s.groups == 1
        }
        self.ops = {op.node.name: op for op in weighted_ops(graph.module)}
        seen, unseen = collect(graph, calibration, seed), collect(graph, held, seed)
        self.held = {self.sites[name].name: unseen[name][0] for name in self.sites}
        self.layers = [
            Layer(
                name=site.name,
                weight=op_weight(graph, self.ops[name]),
                kernel=self._kernel(name),
                halves=(seen[name][0],),
                rows=seen[name][1],
            )
            for name, site in self.sites.items()
        ]

    def _kernel(self, op: str) -> tuple[int, ...]:
        window = self.ops[op].window
        return () if window is None else window.kernel

    def solved(self, solve: Solve) -> dict[str, Tensor]:
        """Every layer solved on the original's own inputs."""
        return {layer.name: solve(layer).double() for layer in self.layers}

    def errors(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Error of each layer's output on held-out rows, with a bias from the calibration rows."""
        return {
            layer.name: held_error(
                layer.weight, weights[layer.name], layer.moments, self.held[layer.name]
            )
            for layer in self.layers
        }

    def stitched(self, weights: Mapping[str, Tensor]) -> Graph:
        """The model with all these weights."""
        changes = []
        by_name = {layer.name: layer for layer in self.layers}
        for op, site in self.sites.items():
            layer, new = by_name[site.name], weights[site.name]
            shift = bias_shift(layer.weight, new, layer.moments)
            changes.append(self._change(site, op, new, shift))
        return apply(self.graph, changes)

    def _change(self, site: Site, op: str, new: Tensor, shift: Tensor) -> SiteChange:
        bias = op_bias(self.graph, self.ops[op])
        total = shift if bias is None else shift + bias
        shape = attribute(self.graph.module, str(self.ops[op].weight.target)).shape
        return SiteChange(
            site=site,
            level="f32",
            weight=new.reshape(shape).float(),
            bias=total.reshape(-1).float(),
        )

    def sequential(self, solve: Solve) -> Graph:
        """The model solved front to back, each layer on what the layers before it now give."""
        subject = self

        class Whole:
            def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
                raise NotImplementedError("all candidates are given")

            def apply(
                self, site: Site, candidate: Candidate, statistics: SiteStatistics
            ) -> SiteChange:
                del candidate
                assert statistics.moments_of is not None
                layer = Layer(
                    name=site.name,
                    weight=statistics.weight,
                    kernel=subject._kernel(site.ops[0]),
                    halves=statistics.moments_of(_same, _same),
                )
                new = solve(layer).double()
                shift = bias_shift(layer.weight, new, layer.moments)
                return subject._change(site, site.ops[0], new, shift)

        sites = list(self.sites.values())
        chosen = {
            s.name: Candidate(site=s.name, level="f32", method="whole", size_bytes=s.size_bytes)
            for s in sites
        }
        return transform(
            self.graph,
            sites,
            chosen,
            {"whole": Whole()},
            self.calibration,
            readers=tensor_readers(self.graph, sites),
            embedding=lambda _: embedding_statistics(torch.zeros(0)),
            seed=self.seed,
        ).graph


def held_error(weight: Tensor, new: Tensor, seen: Moments, held: Moments) -> float:
    """E|W x - W' x - s|^2 / E|W x - E W x|^2 on held-out rows, the shift s the mean of W x - W' x on seen ones.

    Args:
        weight: W [1, m, n].
        new: W'.
        seen: Moments of the calibration rows.
        held: Moments of the held-out rows.
    """
    covariance, mean = centred(held)
    D = weight - new
    off = (D @ (mean - means(seen)[0]).unsqueeze(2)).square().sum()
    return float((layer_loss(D, covariance).sum() + off) / layer_loss(weight, covariance).sum())


def _same(x: Tensor) -> Tensor:
    return x
