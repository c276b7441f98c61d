"""One mask a parameter, whatever groups its units belong to."""

import torch
from torch import nn

from tersor.train import regrow
from tersor.train.regrow import _merged


def test_masks_of_one_parameter_are_one() -> None:
    """As of queries, keys and values in one weight, or of rows and columns."""
    parameter, large = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, regrow._SMALL))
    rows = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    columns = torch.tensor([[1.0, 1.0, 0.0]])
    side = torch.tensor([[1.0], [0.0]])
    found = dict(_merged([(parameter, rows), (large, side), (parameter, columns)]))
    assert torch.equal(found[parameter], rows * columns)
    assert found[parameter].shape == parameter.shape  # of its own shape: one launch for all
    assert found[large] is side  # no second copy of a large one
    last = nn.Parameter(torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    (one,) = _merged([(last, rows[:, :, None, None])])
    assert one[1].stride() == last.stride()
