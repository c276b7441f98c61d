"""The normal form: what is gone, what is explicit, what is folded and what is not; equal outputs."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tersor.graph.contracts import Graph
from tersor.graph.normalise import storages
from tests.unit.capturing import graph_of, random, scale_error, site_of, targets, tensor_of, trained

# Folding and another order of sums: tens of float32 roundings (2**-24) of the output's scale.
ROUNDINGS = 1e-5
BATCH_NORM = "aten.batch_norm.default"


def checked(module: nn.Module, *inputs: Tensor, batch: int = 5) -> Graph:
    """The graph of a module, after it reproduced the module on a batch that capture did not see."""
    graph = graph_of(module, *inputs)
    fresh = [random(batch, *t.shape[1:], seed=9) if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        wanted = module(*fresh)
    (found,) = graph.run(fresh)
    assert scale_error(found, wanted) <= ROUNDINGS
    return graph


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            half, rest = self.a(x).chunk(2, dim=-1)
        with torch.autocast("cpu", enabled=False):
            joined = torch.cat([half.tanh(), rest], -1)
        torch._check(x.shape[1] == 4)
        return self.b(self.drop(joined).detach())


def test_wrappers_are_inlined_and_identities_are_gone() -> None:
    graph = checked(trained(Wrapped()), random(4, 4))
    assert targets(graph) == [
        "aten.linear.default",
        "aten.chunk.default",
        "<built-in function getitem>",
        "<built-in function getitem>",
        "aten.tanh.default",
        "aten.cat.default",
        "aten.linear.default",
    ]


CONVS = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("bias", "groups", "eps"), [(True, 1, 1e-5), (False, 2, 0.3)])
def test_batch_norm_is_folded_into_convolutions(
    rank: int, bias: bool, groups: int, eps: float
) -> None:
    conv, norm = CONVS[rank]
    module = trained(nn.Sequential(conv(4, 6, 3, bias=bias, groups=groups), norm(6, eps=eps)))
    graph = checked(module, random(4, 4, *[5] * rank))
    assert targets(graph) == [f"aten.conv{rank}d.default"]
    gamma, var = module[1].weight, module[1].running_var
    wanted = module[0].weight * (gamma / (var + eps).sqrt()).reshape(-1, 1, *[1] * rank)
    assert scale_error(tensor_of(graph, "0.weight"), wanted.detach()) <= ROUNDINGS


def test_batch_norm_is_folded_behind_same_padding_and_without_gamma() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.BatchNorm2d(3, affine=False))
    assert BATCH_NORM not in targets(checked(trained(module), random(4, 2, 5, 5)))


def test_batch_norm_is_folded_into_a_linear_on_rows() -> None:
    module = trained(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)))
    assert targets(checked(module, random(4, 4))) == ["aten.linear.default"]


def test_batch_norm_over_another_dimension_stays_behind_a_linear() -> None:
    # Linear on [b, 6, 6]: its outputs are the last dimension, the norm's channels the second.
    module = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    assert BATCH_NORM in targets(checked(module, random(4, 6, 4)))


class SecondReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(-x)


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ComputedGamma(nn.Module):
    """A conditional norm: gamma depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        gamma = x.mean((0, 2, 3)).sum() * self.norm.weight
        y = self.conv(x)
        return F.batch_norm(y, self.norm.running_mean, self.norm.running_var, gamma, self.norm.bias)


@pytest.mark.parametrize("module", [SecondReader, SharedWeight, BatchStatistics, ComputedGamma])
def test_batch_norm_that_can_not_be_folded_stays(module: Callable[[], nn.Module]) -> None:
    assert BATCH_NORM in targets(checked(trained(module()), random(4, 2, 5, 5)))


class OwnParameter(nn.Module):
    """The weight is a parameter of the model itself: no module stands before its name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.norm = nn.Parameter(torch.zeros(3, 2, 3, 3)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.kernel))


def test_batch_norm_is_folded_into_a_weight_of_the_model_itself() -> None:
    graph = checked(trained(OwnParameter()), random(4, 2, 5, 5))
    assert targets(graph) == ["aten.conv2d.default"]
    assert site_of(graph, "kernel").weight == "kernel"


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


@pytest.mark.parametrize(
    "conv",
    [lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), lambda: Standardised(2, 3, 3)],
)
def test_computed_weights_are_folded_under_the_name_of_their_layer(
    conv: Callable[[], nn.Module],
) -> None:
    graph = checked(trained(nn.Sequential(conv(), nn.BatchNorm2d(3))), random(4, 2, 5, 5))
    assert targets(graph) == ["aten.conv2d.default"]
    assert site_of(graph, "0").weight == "0.weight"


class Growing(nn.Module):
    """Two vectors span a matrix of 4 MiB; a table of positions is small."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(4))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        outer = self.left.unsqueeze(1) * self.right
        return x @ outer.t() + torch.arange(self.size)


def test_constants_that_grow_too_much_are_computed_at_run_time() -> None:
    size = (1 << 20) // 16
    small = targets(checked(trained(Growing(size)), random(4, 4)))
    assert small == ["aten.linear.default", "aten.add.Tensor"]  # 1 MiB: worth storing
    large = targets(checked(trained(Growing(size + 4)), random(4, 4)))
    assert "aten.mul.Tensor" in large
    assert "aten.matmul.default" in large


class Noise(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, (torch.rand(4) > 2).float()  # random, but always the same outcome


def test_random_constants_are_not_folded() -> None:
    assert "aten.rand.default" in targets(graph_of(Noise(), random(4, 4)))


class WritesThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(4)
        mask.view(2, 2)[0, 1] += 1  # were the zeros stored, every call would add another 1
        return x * mask


def test_constants_that_are_written_to_are_not_folded() -> None:
    graph = checked(WritesThroughView(), random(4, 4))
    x = random(2, 4)
    assert torch.equal(graph.run([x])[0], graph.run([x])[0])
    assert "aten.zeros.default" in targets(graph)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        early = out.sum(-1, keepdim=True)  # before the write
        out += self.b(x)
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
        scale.mul_(2)
        return self.relu(out).clamp_(max=2.0) * scale + out + early


def test_in_place_ops_become_functional() -> None:
    graph = checked(trained(InPlace()), random(4, 4))
    assert not [t for t in targets(graph) if t.split(".")[1].endswith("_")]


class WritesToInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + x


def test_a_write_to_the_input_stays_inside_the_model() -> None:
    graph = graph_of(WritesToInput(), random(4, 4))
    x = random(3, 4)
    assert torch.equal(graph.run([x])[0], random(3, 4) * 4)
    assert torch.equal(x, random(3, 4))


class ViewThenWrite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        view = y[:, :2]
        y.relu_()
        return view.sum(-1)  # sees the write


class ReshapeThenWrite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        view = y.view(-1)
        y.relu_()
        return y + view.sum()


def test_an_earlier_slice_shows_the_write() -> None:
    assert not in_place(checked(ViewThenWrite(), random(4, 4)))


def test_a_write_that_another_view_shows_stays() -> None:
    assert in_place(graph_of(ReshapeThenWrite(), random(4, 4))) == ["aten.relu_.default"]


def test_the_inputs_are_never_written_to() -> None:
    class Reshaped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            view = x.view(x.shape[0], 2, 2)
            x.relu_()
            return view * 2

    graph = graph_of(Reshaped(), random(4, 4))
    assert in_place(graph)
    x = random(3, 4)
    assert torch.equal(graph.run([x])[0], random(3, 4).relu().view(3, 2, 2) * 2)
    assert torch.equal(x, random(3, 4))


class Slices(nn.Module):
    """Writes to parts in every order of view and use that models have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        before = y.sum(1, keepdim=True)
        first, tail = y[:, 0], y[:, 2:]
        y[:, 0] += 1
        y[:, 1:3] = 0
        y[:, 2:][:, 1] *= 5
        first.add_(2)
        y[:, 4] = first
        tail[:, -1:].copy_(tail[:, :1] + first.unsqueeze(1))
        other = y * 2
        y[:, ::2].sub_(x[:, 1::2])
        return torch.cat([y, other, first.unsqueeze(1), tail, before], 1)


def in_place(graph: Graph) -> list[str]:
    return [t for t in targets(graph) if t.split(".")[1].endswith("_")]


def test_writes_to_slices_become_new_values() -> None:
    graph = checked(trained(Slices()), random(4, 6))
    assert not in_place(graph)
    x = random(3, 6, seed=4)
    again = [t.clone() for t in graph.run([x])]
    assert all(torch.equal(one, other) for one, other in zip(graph.run([x]), again, strict=True))


class Attention(nn.Module):
    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


@pytest.mark.parametrize(("given", "wanted"), [(None, 1 / math.sqrt(8)), (0.3, 0.3)])
def test_the_scale_of_attention_is_explicit(given: float | None, wanted: float) -> None:
    q, k, v = (random(4, 2, 5, 8, seed=i) for i in range(3))
    graph = checked(Attention(given), q, k, v)
    (node,) = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    assert node.kwargs["scale"] == pytest.approx(wanted, rel=1e-15)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6))
        self.v, self.u = nn.Parameter(torch.zeros(6, 5)), nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(torch.addmm(self.b, x, self.w), self.v).unsqueeze(1) @ self.u


def test_products_with_a_stored_matrix_become_linear() -> None:
    graph = checked(trained(Products()), random(4, 4))
    assert [t for t in targets(graph) if "unsqueeze" not in t] == ["aten.linear.default"] * 3


class Quadratic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2)


def test_products_of_two_activations_stay() -> None:
    assert "aten.matmul.default" in targets(checked(Quadratic(), random(4, 3, 4)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        x = self.embed(i)
        return self.head(x) - x.tanh() @ self.embed.weight.T


def test_tied_weights_are_one_storage() -> None:
    graph = checked(trained(Tied()), torch.arange(12).reshape(4, 3) % 10)
    assert list(storages(graph.module).values()) == [["embed.weight"]]
    assert graph.parameter_bytes() == 10 * 4 * 4


def bits(module: nn.Module) -> dict[str, bytes]:
    return {k: v.contiguous().numpy().tobytes() for k, v in module.state_dict().items()}


def test_the_original_is_unchanged(resnet20: nn.Module) -> None:
    resnet20.train()
    next(iter(resnet20.children())).eval()
    modes = [m.training for m in resnet20.modules()]
    parameters = [id(p) for p in resnet20.parameters()]
    before = copy.deepcopy(bits(resnet20))
    graph = graph_of(resnet20, random(4, 1, 28, 28))
    graph.run([random(4, 1, 28, 28)])
    assert bits(resnet20) == before
    assert [m.training for m in resnet20.modules()] == modes
    assert [id(p) for p in resnet20.parameters()] == parameters
    own = {t.data_ptr() for t in [*resnet20.parameters(), *resnet20.buffers()]}
    assert not own & set(storages(graph.module))


def test_a_real_network_has_no_batch_norm_left(resnet20: nn.Module) -> None:
    graph = checked(resnet20, random(4, 1, 28, 28))
    assert BATCH_NORM not in targets(graph)
