"""The refit behind cuts that put new nodes in front of the original's: norms, means."""

import pytest
import torch
from torch import Tensor, nn

from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.contracts import Graph
from tersor.transform.narrow import narrow

WIDTH = 16


class Stream(nn.Module):
    """A table, two branches behind norms, a head; the stream has half the rank of its width."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, WIDTH)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)
        basis = torch.randn(WIDTH // 2, WIDTH) / WIDTH**0.5
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(23, WIDTH // 2) @ basis)
            for layer in self.down:
                layer.weight.copy_(basis.T @ torch.randn(WIDTH // 2, 20) / 4)
                layer.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(up(norm(x)).relu())
        y: Tensor = self.head(self.norms[-1](x))
        return y


def captured(norm: type[nn.Module]) -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = Stream(norm).eval()
    call, tensors = flatten_item(torch.arange(14).reshape(2, 7), "example")
    return capture(model, Samples(call, tensors)).graph


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_stream_that_is_cut_is_made_up_for_by_its_readers(norm: type[nn.Module]):
    graph = captured(norm)
    axes = analyse_axes(graph)
    (width,) = [w for w in axes.widths if w.kind == "stream"]
    keep = {width.name: [i for i in range(WIDTH) if i % 8 != 3]}
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randint(23, (32, 7), generator=generator),) for _ in range(4)]
    test = torch.randint(23, (32, 7), generator=generator)
    wanted = graph.run([test])[0]
    plain, fitted = keep_units(graph, axes, keep), narrow(graph, axes, keep, batches).graph
    errors = [float((g.run([test])[0] - wanted).square().mean()) for g in (plain, fitted)]
    assert errors[1] < 0.25 * errors[0]
