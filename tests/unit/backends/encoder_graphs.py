"""Small transformers, what they become in an Inductor build, and the comparison with op by op."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from tersor.backends.inductor.lowering import Form, lower
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph
from tersor.kernels.narrow_attention import narrow_attention
from tersor.kernels.narrow_linear import narrow_linear
from tests.conformance.test_backends import graph_of, random

# Half a unit in the last place an op, squared, about thirty ops in a row.
HALF = {torch.bfloat16: 30 * 2.0**-18, torch.float16: 30 * 2.0**-24}
NAMES = {
    narrow_attention: "attentions", narrow_linear: "layers", torch.ops.aten.linear.default: "linears",
    torch.ops.aten.scaled_dot_product_attention.default: "plain", torch.ops.aten.layer_norm.default: "norms",
    torch.ops.aten.add.Tensor: "adds", torch.ops.aten.gelu.default: "gelus",
}  # fmt: skip
WIDTH, TOKENS = 24, 6


def drawn(module: nn.Module) -> nn.Module:
    """Weights that keep a signal's size, norms that are no identity."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            values = random(*p.shape, seed=i + 1)
            is_scale = p.dim() == 1 and name.endswith("weight")
            size = 1.5 * p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3
            p.copy_(values * size + (1.0 if is_scale else 0.0))
    return module.eval()


def made(module: nn.Module, *inputs: Tensor) -> Graph:
    return graph_of(drawn(module), *inputs)


def form(dtype: torch.dtype = torch.float16, **fields: Any) -> Form:
    return Form(dtype=dtype, blocks=True, **fields)


def calls(graph: Graph, how: Form | None = None) -> list[Any]:
    module = lower(graph, how or form()).module
    return [n for n in module.graph.nodes if n.op == "call_function"]


def counts(graph: Graph, how: Form | None = None) -> dict[str, int]:
    """How many of each op there are, without those that there are none of."""
    return dict(Counter(NAMES[n.target] for n in calls(graph, how) if n.target in NAMES))


def check(graph: Graph, *inputs: Tensor, **wanted: int) -> None:
    """Fused and unfused modules agree within their roundings, and these ops are there and no others."""
    assert counts(graph) == wanted
    for dtype, bound in HALF.items():
        with torch.no_grad():
            found = lower(graph, form(dtype)).module(*inputs)
            exact = lower(graph, Form()).module(*inputs)
        assert len(found) == len(exact)
        for one, other in zip(found, exact, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            error = (one.double() - other.double()).square().sum() / other.double().square().sum()
            assert float(error) <= bound


class Attention(nn.Module):
    """Attention with all that its kernel may be asked for."""

    def __init__(
        self, width: int = WIDTH, heads: int = 2, sizes: tuple[int, int] = (8, 8), **given: Any
    ) -> None:
        super().__init__()
        self.heads, (self.size, value), self.given = heads, sizes, given
        self.q, self.k = (nn.Linear(width, heads * self.size) for _ in range(2))
        self.v = nn.Linear(width, heads * value, bias=False)
        self.out = nn.Linear(heads * value, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def found(self, x: Tensor, **more: Any) -> Tensor:
        y = scaled_dot_product_attention(*self.read(x), **self.given, **more)
        return y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.found(x))
        return y


class Layer(nn.Module):
    """A transformer's layer, norms in front (ViT) or behind (BERT)."""

    def __init__(self, *, in_front: bool, width: int = WIDTH, inner: int = 40) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-3)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.in_front = in_front

    def feed(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(gelu(self.up(x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        if self.in_front:
            x = x + self.attention(self.first(x))
            return x + self.feed(self.second(x))
        x = self.first(x + self.attention(x))
        y: Tensor = self.second(self.feed(x) + x)
        return y


class Two(nn.Module):
    """Two layers and a head, as models have them."""

    def __init__(self, *, in_front: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(in_front=in_front) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


X = random(3, TOKENS, WIDTH)


class Of(nn.Module):
    """Two linears, two norms, and a forward of the test's own."""

    def __init__(self, forward: Callable[..., Any], width: int = WIDTH, inner: int = WIDTH) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm, self.behind = nn.LayerNorm(width), nn.LayerNorm(inner)
        self.place = nn.Parameter(torch.zeros(1, TOKENS, inner))
        self.called = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.called(self, *inputs)


def using(value: Tensor, then: Callable[[Tensor], Any]) -> Any:
    return then(value)


def one(x: Tensor) -> Tensor:
    """Nothing that a capture could compute, and the same for all samples."""
    return (0.0 * x.sum()).exp()


def alike(m: Any, x: Tensor) -> Tensor:
    """A value that is no constant, [1, tokens, inner]."""
    found: Tensor = m.place * one(x)
    return found


def choice(**fields: Any) -> BuildChoice:
    chosen = {"blocks": "fused", **fields}
    return BuildChoice(backend="inductor", precision="bf16", batch=3, options=chosen)
