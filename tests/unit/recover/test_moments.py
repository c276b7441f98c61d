"""Means and deviations of channels: set back exactly where that is possible, and kept only if it helps."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.core.packing import Packing
from tersor.core.recovery import Recover
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import parameters_by_name
from tersor.graph.training import leaves
from tersor.ops.storing import pack_nearest
from tersor.recover.blocks import reconstruct
from tersor.recover.goals import Goals, Teacher
from tersor.recover.moments import Moved
from tersor.recover.tensors import Snapshot, Tensors
from tests.unit.capturing import graph_of, random, site_of, trained
from tests.unit.recover.test_blocks import Residual, batches_of, error, int8, shifted

# Sums of some thousand float32 values, each rounded, and a product with the factor.
ROUNDING = 1e-5
ONE_STEP = Recover(steps=1, batch=16, rate=1e-6)  # hardly any training: what helps is the moments


class Late(nn.Module):
    """A batch norm behind an addition, which no map can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.norm(x + self.body(x)).relu()
        return self.head(x.mean((2, 3)))


def images() -> list[tuple[Tensor, ...]]:
    return batches_of(random(136, 1, 6, 6, seed=3))


def moved(
    original: Graph, hurt: Graph, batches: Sequence[tuple[Tensor, ...]], fixed: Sequence[str] = ()
) -> tuple[Moved, Tensors]:
    goals = Goals(Teacher(graph=original, kind="logits"), hurt, batches)
    tensors = Tensors(hurt.module, leaves(hurt, fixed))
    return Moved(goals, hurt.module, tensors), tensors


def with_tensors(graph: Graph, own: Snapshot) -> dict[str, Tensor]:
    return {**parameters_by_name(graph.module), **own}


def value_of(graph: Graph, own: Snapshot, name: str, x: Tensor) -> Tensor:
    """A node's value with some tensors in place of the graph's, by plain steps."""
    tensors, env = with_tensors(graph, own), {}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            env[node.name] = x
        elif node.op == "get_attr":
            env[node.name] = tensors[str(node.target)]
        elif node.op == "call_function":
            args = torch.fx.map_arg(node.args, lambda n: env[n.name])
            env[node.name] = node.target(*args, **node.kwargs)
        if node.name == name:
            return env[name]
    raise KeyError(name)


def test_a_channel_s_scale_and_shift_come_back_exactly() -> None:
    original = graph_of(trained(Residual()), random(4, 1, 6, 6))
    factors = torch.tensor([0.5, 2.0, 1.0, 1.5, 0.8, 1.2, 0.7, 1.1]).reshape(-1, 1, 1, 1)
    hurt = shifted(original, "up.0", lambda w: w * factors)
    found = moved(original, hurt, images())[0].tensors(has_factors=True)
    stored = parameters_by_name(original.module)
    right = {name: stored[name.removesuffix("_new")] for name in found}
    for name, tensor in found.items():
        scale = float(right[name].abs().max())
        assert float((tensor - right[name]).abs().max()) <= 20 * ROUNDING * scale, name
    assert {"up.0.weight_new", "up.0.bias", "head.weight"} <= set(found)


def test_means_alone_change_no_weight() -> None:
    original = graph_of(trained(Residual()), random(4, 1, 6, 6))
    hurt = shifted(original, "up.0", lambda w: 0.5 * w)
    found = moved(original, hurt, images())[0].tensors(has_factors=False)
    before = parameters_by_name(hurt.module)
    assert all(torch.equal(t, before[n]) for n, t in found.items() if "weight" in n)
    seen = torch.cat([flat[0] for i, flat in enumerate(images()) if i != 7])
    (name,) = site_of(original, "up.0").ops
    got, wanted = value_of(hurt, found, name, seen), value_of(original, {}, name, seen)
    assert torch.allclose(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=ROUNDING, rtol=ROUNDING)
    assert not torch.allclose(got.std((0, 2, 3)), wanted.std((0, 2, 3)), rtol=0.1)


def test_a_batch_norm_that_stays_is_measured_anew() -> None:
    """The maps before it can't be changed: the norm alone sets mean and deviation right."""
    original = graph_of(trained(Late()), random(4, 1, 6, 6))
    (norm,) = [
        n.name for n in original.module.graph.nodes if str(n.target) == "aten.batch_norm.default"
    ]
    hurt = shifted(original, "body", lambda w: 0.4 * w)
    maps = [op for name in ("stem", "body") for op in site_of(original, name).ops]
    found = moved(original, hurt, images(), fixed=maps)[0].tensors(has_factors=True)
    assert {n for n in found if not n.startswith("head")} == {"norm.weight", "norm.bias"}
    seen = torch.cat([flat[0] for i, flat in enumerate(images()) if i != 7])
    got, wanted = value_of(hurt, found, norm, seen), value_of(original, {}, norm, seen)
    given = value_of(hurt, {}, norm, seen)
    for moment in (torch.mean, torch.std):
        right = moment(wanted, (0, 2, 3))
        assert torch.allclose(moment(got, (0, 2, 3)), right, atol=ROUNDING, rtol=ROUNDING)
        assert not torch.allclose(moment(given, (0, 2, 3)), right, rtol=0.1)


class Tokens(nn.Module):
    """A map over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.up(self.words(input_ids)).relu() * attention_mask.unsqueeze(-1)
        return self.head(x.sum(1))


def test_padding_has_no_say() -> None:
    """Where the padding's token changes, nothing else does."""
    ids = torch.randint(0, 10, (32, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(32, 6, dtype=torch.int64)
    mask[::2, 3:] = 0
    original = graph_of(trained(Tokens()), ids[:4], mask[:4])
    hurt = shifted(original, "up", lambda w: 0.5 * w)
    one, other = (torch.where(mask > 0, ids, pad) for pad in (0, 10))
    found = [
        moved(original, hurt, [(x[i : i + 8], mask[i : i + 8]) for i in range(0, 32, 8)])[0]
        for x in (one, other)
    ]
    left, right = (f.tensors(has_factors=True) for f in found)
    assert all(torch.equal(t, right[n]) for n, t in left.items())
    assert not torch.equal(left["up.bias"], parameters_by_name(hurt.module)["up.bias"])


def test_codes_and_masks_stay() -> None:
    """Of int8 the scales move; of weights with zeros in place nothing but the bias."""
    original = graph_of(trained(Residual()), random(4, 1, 6, 6))
    weight = parameters_by_name(original.module)["up.1.weight"]
    packing = Packing(kind="sparse", shape=tuple(weight.shape), bits=32, kept=weight.numel() // 2)
    thinned = weight.clone().reshape(-1)
    thinned[thinned.abs().argsort()[: weight.numel() - packing.kept]] = 0
    bits = pack_nearest(thinned.double().reshape(1, len(weight), -1), packing)
    sparse = SiteChange(site=site_of(original, "up.1"), level="sparse50_weight", packed=bits)
    rounded = apply(original, [int8(original, "up.0"), sparse])
    found, tensors = moved(original, rounded, images())
    own = found.tensors(has_factors=True)
    assert set(own) == set(tensors.leaves)
    assert {"up.0.weight_scale", "up.1.bias"} <= set(own)
    assert not {n for n in own if n.startswith("up.1.weight")}
    graph = reconstruct(
        Teacher(graph=original, kind="logits"), rounded, images(), Recover(steps=20, batch=16),
        seed=0,
    ).graph  # fmt: skip
    before, after = (parameters_by_name(g.module) for g in (rounded, graph))
    (kept,) = [n for n in before if n.startswith("up.1.weight")]
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before["up.1.bias"], after["up.1.bias"])
    codes = [n for n in before if n.endswith("_codes")]
    assert codes
    assert all(torch.equal(before[n], after[n]) for n in codes)


@pytest.mark.parametrize("factor", [0.6, 1.0])
def test_what_helps_is_reported_and_what_does_not_is_left_out(factor: float) -> None:
    original = graph_of(trained(Residual()), random(4, 1, 6, 6))
    hurt = shifted(original, "up.0", lambda w: factor * w)
    done = reconstruct(
        Teacher(graph=original, kind="logits"), hurt, images(), replace(ONE_STEP, whole=1.0), seed=0
    )
    first = done.recovery.parts[0]
    assert (first.part, first.steps) == ("moments", 0)
    if factor == 1.0:
        assert first.name == ""
        assert first.after == first.before
        return
    assert first.name == "means and deviations"
    assert first.after < 1e-3 * first.before
    new = (random(64, 1, 6, 6, seed=9),)
    assert error(done.graph, original, new) < 1e-3 * error(hurt, original, new)
