"""The geometry of outputs: stated, or inferred with a warning."""

import pytest
import torch
from torch import Tensor

from tersor.capture.outputs import output_kind
from tersor.core.errors import DataError
from tersor.core.records import OutputKind
from tests.unit.capturing import random

UNIT = torch.nn.functional.normalize(random(5, 8), dim=1)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (random(5, 10), "logits"),
        (UNIT, "embedding"),
        (random(5, 10).softmax(1), "values"),  # probabilities: a softmax of them means nothing
        (random(5, 1), "values"),
        (random(5), "values"),
        (random(5, 3, 4, 4), "values"),
    ],
)
def test_inferred(output: Tensor, kind: OutputKind) -> None:
    with pytest.warns(UserWarning, match=f"inferred as '{kind}'.*say tersor.Data"):
        assert output_kind(None, (torch.zeros(5, dtype=torch.long), output)) == kind


def test_stated_needs_no_warning() -> None:
    assert output_kind("values", (random(5, 10),)) == "values"


def test_no_float_output() -> None:
    with pytest.raises(DataError, match="returns no float tensor"):
        output_kind("logits", (torch.zeros(5, dtype=torch.long), torch.tensor(1.0)))
