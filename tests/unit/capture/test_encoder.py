"""nn.TransformerEncoderLayer: its fused kernel would fix the batch size."""

import torch
from torch import nn

from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item


def test_an_encoder_layer_is_captured_with_an_open_batch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    call, flat = flatten_item(torch.randn(2, 5, 16), "example")
    graph = capture(layer, Samples(call, flat)).graph
    assert torch.backends.mha.get_fastpath_enabled() == before
    x = torch.randn(7, 5, 16)
    with torch.no_grad():
        wanted = layer.eval()(x)
    # Fused and plain kernels sum in another order.
    assert torch.allclose(graph.run([x])[0], wanted, atol=1e-5)
