"""The geometry of outputs: stated, or inferred with a warning."""

import pytest
import torch
from torch import Tensor

from tersor.capture.outputs import output_kind, require_samples
from tersor.core.errors import CaptureError, DataError
from tersor.core.records import OutputKind, TensorSpec
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


@pytest.mark.parametrize(
    ("shape", "one", "other", "words"),
    [
        ((), torch.tensor(1.0), torch.tensor(2.0), "one value for a whole batch"),
        ((6, 4), torch.ones(6, 4), torch.ones(6, 4), "a constant"),
        ((None, None), torch.ones(1, 1), torch.zeros(1, 1), "several dimensions"),
        ((None, 4), torch.ones(6, 4), torch.zeros(6, 4), "what one sample gives"),  # flattened
        ((2, None, 4), torch.ones(2, 1, 4), torch.zeros(2, 1, 4), "what one sample gives"),
    ],
)
def test_outputs_that_are_no_rows(
    shape: tuple[int | None, ...], one: Tensor, other: Tensor, words: str
) -> None:
    spec = TensorSpec(name="extra", dtype="float32", shape=shape)
    with pytest.raises(CaptureError, match=f"'extra'.*{words}.*wanted outputs of one row a sample"):
        require_samples([spec], [one], [other])


def test_rows_and_fixed_numbers_are_outputs() -> None:
    specs = [
        TensorSpec(name="logits", dtype="float32", shape=(None, 3)),
        TensorSpec(name="scale", dtype="float32", shape=()),
    ]
    scale = torch.tensor(2.5)
    require_samples(specs, [torch.zeros(1, 3), scale], [torch.ones(1, 3), scale.clone()])
