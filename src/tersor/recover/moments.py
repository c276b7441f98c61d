"""Means and deviations of channels set back to the original's: batch-norm statistics, re-estimated.

Behind a cut or a rounding the values of a channel have another mean and another deviation than the
ones that later layers were trained on. A batch norm whose statistics are measured anew sets both
right; most are folded into the maps in front of them by then, so that the same is done to every map
and every batch norm that is still there, front to back on what the corrected layers before make of
the samples:

    y' = f y + s,    f = sd(original) / sd(y) (or 1),    s = mean(original) - f mean(y)

``f`` goes into the rows of the weight (or into the scale of its codes) and ``f``, ``s`` into the bias.
An exact refit leaves the means right and the deviations too small, as least squares shrink towards
the mean; what helps is found by trying, and kept only there.

Source: Jordan et al. 2022, arXiv:2211.08403 (deviations reset, batch norms or none); Nagel et al.
2019, arXiv:1906.04721, section 4.2 (means).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from tersor.recover.goals import Goals
from tersor.recover.runs import Run
from tersor.recover.tensors import Snapshot, Tensors

aten = torch.ops.aten
_MOST = (
    4.0  # times wider or narrower: beyond, a channel hardly moves and its deviation says nothing
)
_CHANNELS = {  # op -> the dimension of its value that holds the channels
    aten.linear.default: -1,
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
    aten.conv3d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 1,
    aten.conv3d.padding: 1,
    aten.batch_norm.default: 1,
}
_RESTORED = torch.ops.quantized_decomposed.dequantize_per_channel.default


@dataclass(frozen=True, slots=True)
class _Layer:
    """An op whose channels can be set right.

    Attributes:
        rows: Targets that hold a row, or a scale, for each channel; empty where codes are packed.
        shift: Target of the bias.
        dim: Of the channels in its value.
    """

    name: str
    rows: tuple[str, ...]
    shift: str
    dim: int


Moments = tuple[Tensor, Tensor]  # mean and deviation of each channel, float64


class Moved:
    """The original's means and deviations, measured once, and tensors that come up to them."""

    def __init__(self, goals: Goals, module: fx.GraphModule, tensors: Tensors) -> None:
        self._module, self._tensors = module, tensors
        pairs = list(zip(goals.batches, goals.masks, goals.unseen, strict=True))
        self._flats = [flat for flat, _, is_unseen in pairs if not is_unseen]
        self._masks = [mask for _, mask, is_unseen in pairs if not is_unseen]
        known = goals.teacher.known()
        self._layers = {x.name: x for x in _layers(module, tensors) if x.name in known}
        self._wanted: dict[str, Moments] = {}
        run = Run(goals.teacher.graph.module, self._flats)
        for node in run.nodes:
            layer = self._layers.get(node.name)
            if layer is not None:
                found = [v[node.name] for v in run.upto([node.name], [node.name])]
                kept = [goals.teacher.part(node.name, value) for value in found]
                self._wanted[node.name] = _moments(kept, self._masks, layer.dim)

    @property
    def names(self) -> tuple[str, ...]:
        """Ops that can be set right, in graph order."""
        return tuple(n.name for n in self._module.graph.nodes if n.name in self._layers)

    def tensors(self, *, has_factors: bool) -> Snapshot:
        """What the tensors become.

        Args:
            has_factors: Deviations as well as means.
        """
        fresh: Snapshot = {}
        run = Run(
            self._module, self._flats, lambda t: fresh[t] if t in fresh else self._tensors.value(t)
        )
        for name in self.names:
            layer = self._layers[name]
            found = [v[name] for v in run.upto([name], [name])]
            factor, shift = self._change(layer, found, has_factors=has_factors)
            fresh |= self._changed(layer, factor, shift)
            for values in run.values:
                if name in values:  # nothing reads it twice with what it was before
                    values[name] = _along(layer, factor, values[name]) * values[name] + _along(
                        layer, shift, values[name]
                    )
        return fresh

    def _change(
        self, layer: _Layer, found: Sequence[Tensor], *, has_factors: bool
    ) -> tuple[Tensor, Tensor]:
        mean, deviation = _moments(found, self._masks, layer.dim)
        right, width = self._wanted[layer.name]
        factor = torch.ones_like(mean)
        if has_factors and layer.rows:
            ratio = width / deviation
            is_sound = torch.isfinite(ratio) & (ratio < _MOST) & (ratio > 1 / _MOST)
            factor = torch.where(is_sound, ratio, factor)
        return factor, right - factor * mean

    def _changed(
        self, layer: _Layer, factor: Tensor, shift: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        for target in layer.rows:
            old = self._tensors.value(target).detach()
            rows = factor.to(old.dtype).reshape(-1, *[1] * (old.dim() - 1))
            yield target, old * rows
        old = self._tensors.value(layer.shift).detach()
        yield layer.shift, (factor * old.double() + shift).to(old.dtype)


def _layers(module: fx.GraphModule, tensors: Tensors) -> Iterator[_Layer]:
    """Those whose bias can be trained, and that share their tensors with no other op."""
    for node in module.graph.nodes:
        if node.target not in _CHANNELS:
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        shift, own = _own(bias, node, tensors), _own(weight, node, tensors)
        if shift is not None:
            rows = () if own is None else (own,)
            yield _Layer(node.name, rows, shift, _CHANNELS[node.target])


def _own(value: Any, reader: fx.Node, tensors: Tensors) -> str | None:
    """A stored tensor that is trained and read by one op alone; of codes their scale."""
    if isinstance(value, fx.Node) and value.target is _RESTORED:
        is_rows = value.args[3] == 0 and list(value.users) == [reader]
        return _own(value.args[1], value, tensors) if is_rows else None
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    leaf = tensors.leaves.get(str(value.target))
    return None if leaf is None or leaf.readers != {reader.name} else leaf.target


def _along(layer: _Layer, values: Tensor, like: Tensor) -> Tensor:
    shape = [1] * like.dim()
    shape[layer.dim] = -1
    return values.to(like.dtype).reshape(shape)


def _moments(values: Sequence[Tensor], masks: Sequence[Tensor | None], dim: int) -> Moments:
    """Over samples, places and real tokens."""
    count = 0
    sums: Mapping[str, Tensor] | None = None
    for value, mask in zip(values, masks, strict=True):
        rows = value.detach().movedim(dim, -1)
        if mask is not None and rows.dim() > 2 and rows.shape[:2] == mask.shape:
            rows = rows[mask]
        rows = rows.reshape(-1, rows.shape[-1]).double()
        own = {"first": rows.sum(0), "second": rows.square().sum(0)}
        sums = own if sums is None else {k: sums[k] + t for k, t in own.items()}
        count += len(rows)
    assert sums is not None
    mean = sums["first"] / count
    return mean, (sums["second"] / count - mean.square()).clamp(min=0.0).sqrt()
