"""Reading, bounding and splitting the caller's inputs; every refusal says where."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tersor.capture.samples import TO_INPUTS, Samples, collect, flatten_item
from tersor.core.data import RESERVOIR, SPLITS, Data
from tersor.core.errors import DataError


def numbered(count: int) -> Tensor:
    """Sample i holds i."""
    return torch.arange(count, dtype=torch.float32).unsqueeze(1)


def values(part: Samples) -> list[int]:
    return part.tensors[0][:, 0].int().tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 500), st.integers(0, 2**32 - 1))
def test_the_split_is_complete_disjoint_and_60_20_20(count: int, seed: int) -> None:
    parts = collect(Data([numbered(count)]), seed)
    sizes = {name: len(part) for name, part in parts.items()}
    wanted = max(1, round(0.2 * count))
    assert sizes == {"calibration": count - 2 * wanted, "search": wanted, "test": wanted}
    assert sorted(v for part in parts.values() for v in values(part)) == list(range(count))
    again = collect(Data([numbered(count)]), seed)
    assert [values(again[name]) for name in SPLITS] == [values(parts[name]) for name in SPLITS]


def test_another_seed_splits_otherwise() -> None:
    splits = {tuple(values(collect(Data([numbered(50)]), seed)["test"])) for seed in range(5)}
    assert len(splits) == 5


def test_the_batch_size_of_the_stream_does_not_matter() -> None:
    whole = collect(Data([numbered(50)]), 3)
    parts = collect(Data(list(numbered(50).split(7))), 3)
    assert all(torch.equal(whole[n].tensors[0], parts[n].tensors[0]) for n in SPLITS)


def stream(count: int, batch: int) -> Iterator[Tensor]:
    yield from numbered(count).split(batch)


def test_the_reservoir_is_bounded_and_fair() -> None:
    count = 5 * RESERVOIR
    kept: list[int] = []
    for seed in range(3):
        parts = collect(Data(stream(count, 512)), seed)
        found = [v for part in parts.values() for v in values(part)]
        assert len(found) == len(set(found)) == RESERVOIR
        kept += found
    # Each fifth of the stream keeps a fifth: binomial, five deviations of it.
    shares = np.histogram(kept, bins=5, range=(0, count))[0] / len(kept)
    assert np.abs(shares - 0.2).max() < 5 * (0.2 * 0.8 / len(kept)) ** 0.5


def test_up_to_the_bound_everything_is_kept() -> None:
    parts = collect(Data(stream(RESERVOIR, 1000)), 0)
    assert sum(len(p) for p in parts.values()) == RESERVOIR


def test_a_loader_may_use_its_buffer_again() -> None:
    def reusing() -> Iterator[Tensor]:
        buffer = torch.zeros(5, 1)
        for rows in numbered(20).split(5):
            buffer.copy_(rows)
            yield buffer

    parts = collect(Data(reusing()), 0)
    assert sorted(v for part in parts.values() for v in values(part)) == list(range(20))


def test_kept_samples_do_not_hold_their_batches() -> None:
    item = torch.zeros(10, 1)
    part = collect(Data([item]), 0)["test"]
    assert part.tensors[0].untyped_storage().data_ptr() != item.untyped_storage().data_ptr()


def test_forms_of_inputs() -> None:
    x = numbered(10)
    labels = torch.zeros(10, dtype=torch.long)
    loader = DataLoader(TensorDataset(x, labels), batch_size=4)
    forms: list[Any] = [
        x,  # one batch
        x.numpy(),
        [x],
        [x.numpy()],
        [(x,)],
        [[x]],
        ({"x": part}["x"] for part in x.split(3)),
        DataLoader(TensorDataset(x), batch_size=4),
    ]
    for form in forms:
        assert len(collect(Data(form), 0)["calibration"]) == 6
    parts = collect(Data(loader, to_inputs=lambda batch: batch[0]), 0)
    assert len(parts["test"].tensors) == 1
    both = collect(Data([{"x": x, "nested": [labels, None, 3]}]), 0)["test"]
    assert both.call.kwargs.keys == ("x", "nested")
    assert [t.dtype for t in both.tensors] == [torch.float32, torch.int64]


def test_three_parts() -> None:
    x = numbered(9)
    data = Data(calibration=[x[:5]], search=x[5:7], test=[x[7:]])
    assert {n: values(p) for n, p in collect(data, 0).items()} == {
        "calibration": [0, 1, 2, 3, 4],
        "search": [5, 6],
        "test": [7, 8],
    }


def test_batches_are_in_order_and_complete() -> None:
    part = flatten_item((numbered(7), numbered(7) + 1), "x")
    samples = Samples(*part)
    found = list(samples.batches(3))
    assert [len(flat[0]) for flat in found] == [3, 3, 1]
    assert torch.equal(torch.cat([flat[1] for flat in found]), numbered(7) + 1)
    assert samples.take(torch.tensor([2, 0])).tensors[1].flatten().tolist() == [3, 1]


NAN = torch.tensor([[0.0], [1.0], [float("nan")], [float("inf")]])
REFUSED: dict[str, tuple[Data, str]] = {
    "empty": (Data([]), "data: found no samples, wanted a few dozen"),
    "used up": (Data(iter(())), "an iterator that was already used up is empty, too"),
    "empty batch": (Data([torch.zeros(0, 3)]), "data: found no samples"),
    "one sample": (Data([torch.zeros(1, 3)]), r"found 1 sample\(s\), wanted at least 3"),
    "two samples": (Data([torch.zeros(2, 3)]), "calibration, search, test"),
    "NaN": (Data([torch.zeros(4, 1), NAN]), "data, item 1, .*sample 2 holds NaN or infinity"),
    "NaN in a dict": (Data([{"x": NAN}]), "data, item 0, 'x': sample 2 holds NaN"),
    "ragged": (
        Data([torch.zeros(4, 3), torch.zeros(4, 5)]),
        r"data: input 0 comes in 2 shapes a sample, such as \[\(3,\), \(5,\)\]; wanted one: pad",
    ),
    "types": (
        Data([torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64)]),
        "input 0 comes in types .*float32.*int64",
    ),
    "first dimensions": (
        Data([(torch.zeros(4, 3), torch.zeros(5))]),
        r"data, item 0: the tensors hold \[4, 5\] samples in dimension 0.*to_inputs=",
    ),
    "another form": (
        Data([torch.zeros(4, 3), (torch.zeros(4, 3), torch.zeros(4))]),
        "data, item 1: passed in another form than the items before it",
    ),
    "scalar": (Data([torch.tensor(1.0)]), "found a scalar tensor, wanted dimension 0"),
    "no tensor": (Data([3]), "data, item 0: found int without any tensor"),
    "object": (Data([object()]), "found object, wanted a tensor, a tuple"),
    "complex": (Data([torch.zeros(4, dtype=torch.complex64)]), "complex and sparse"),
    "parts in other forms": (
        Data(
            calibration=[torch.zeros(4, 3)],
            search=[{"x": torch.zeros(4, 3)}],
            test=[torch.zeros(4, 3)],
        ),
        "the search part is passed in another form than the calibration part",
    ),
    "empty part": (
        Data(calibration=[torch.zeros(4, 3)], search=[], test=[torch.zeros(4, 3)]),
        "search: found no samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_data_is_refused(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(DataError, match=words):
        collect(data, 0)


def test_the_way_out_is_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        collect(Data([object()]), 0)
    assert TO_INPUTS in str(caught.value)
