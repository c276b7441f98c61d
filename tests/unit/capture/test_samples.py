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

from tersor.capture.samples import (
    TO_INPUTS,
    Samples,
    as_carried,
    collect,
    flatten_item,
    varying,
)
from tersor.core.data import MOST_READ, RESERVOIR, SPLITS, Data
from tersor.core.errors import DataError
from tersor.core.records import Signature, Structure, TensorSpec


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


def test_an_endless_stream_ends() -> None:
    read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1000
            yield torch.zeros(1000, 1)

    parts = collect(Data(endless()), 0)
    assert sum(len(p) for p in parts.values()) == RESERVOIR
    assert MOST_READ <= read < MOST_READ + 1000


def test_to_inputs_that_raises_is_named_with_the_item() -> None:
    items = [{"image": torch.zeros(2, 1)}, {"picture": torch.zeros(2, 1)}]
    data = Data(items, to_inputs=lambda item: item["image"])
    with pytest.raises(DataError, match=r"data, item 1: to_inputs raised KeyError: 'image'.*dict"):
        collect(data, 0)


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
    "ragged parts": (
        Data(calibration=[torch.zeros(4, 3)], search=[torch.zeros(4, 5)], test=[torch.zeros(4, 3)]),
        r"calibration: input 0 comes in 2 shapes a sample, such as \[\(3,\), \(5,\)\]",
    ),
    "parts of other types": (
        Data(
            calibration=[torch.zeros(4, 3)],
            search=[torch.zeros(4, 3)],
            test=[torch.zeros(4, 3, 1)],
        ),
        "test: input 0 is torch.float32 with 3 dimensions, in the calibration part .* with 2",
    ),
    "ranks": (
        Data([torch.zeros(4, 3), torch.zeros(4, 3, 1)]),
        r"data: input 0 comes with \[2, 3\] dimensions; wanted one number",
    ),
    "zero-size": (
        Data([torch.zeros(4, 0)]),
        r"data, item 0, \[0\]: found shape \(4, 0\), which holds no value; wanted every size",
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


# --- samples of several shapes


def lengths(*sizes: int, count: int = 6) -> list[dict[str, Tensor]]:
    """Batches of one length each; every row holds its own number, beside a label of one shape."""
    items, number = [], 0
    for size in sizes:
        rows = torch.arange(number, number + count)
        items.append({"x": rows[:, None].expand(count, size).float(), "label": rows[:, None]})
        number += count
    return items


def ids(part: Samples) -> list[int]:
    return [int(v) for flat in part.groups for v in flat[1][:, 0]]


def test_samples_are_grouped_by_shape() -> None:
    data = Data(calibration=lengths(3, 7, 3, 5), search=lengths(7), test=lengths(2, 3))
    parts = collect(data, 0, ragged=True)
    part = parts["calibration"]
    assert [f[0].shape for f in part.groups] == [(6, 7), (6, 5), (12, 3)]
    assert len(part) == 24
    assert part.tensors[0].shape == (6, 7)  # the largest shape
    assert sorted(ids(part)) == list(range(24))
    assert all(bool((f[0] == f[1]).all()) for f in part.groups)  # rows stay together
    assert varying(parts.values()) == {(0, 1)}
    assert varying([parts["search"]]) == frozenset()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 40))
def test_ragged_batches_are_rectangular_and_complete(
    sizes: list[int], count: int, batch: int
) -> None:
    data = Data(calibration=lengths(*sizes, count=count), search=lengths(2), test=lengths(2))
    part = collect(data, 0, ragged=True)["calibration"]
    found = list(part.batches(batch))
    assert all(1 <= len(flat[0]) <= batch for flat in found)
    assert sorted(int(v) for flat in found for v in flat[1][:, 0]) == sorted(ids(part))
    some = part.limited(batch)
    assert len(some) == min(batch, len(part))
    assert len(set(ids(some))) == len(some)


def test_a_split_of_ragged_samples_is_complete() -> None:
    parts = collect(Data(lengths(3, 5, 4)), 1, ragged=True)
    assert sorted(i for p in parts.values() for i in ids(p)) == list(range(18))
    assert {n: len(p) for n, p in parts.items()} == {"calibration": 10, "search": 4, "test": 4}


def test_taking_ragged_samples() -> None:
    data = Data(calibration=lengths(3, 7), search=lengths(2), test=lengths(2))
    part = collect(data, 0, ragged=True)["calibration"]
    assert ids(part) == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]
    assert ids(part.take(torch.tensor([0, 11]))) == [6, 5]
    assert ids(part.take(slice(8, None))) == [2, 3, 4, 5]
    assert part.take(slice(8, None)).others == ()
    assert {len(f[0]) for f in part.limited(4).groups} == {2}  # shapes keep their shares


def test_samples_are_cast_for_the_graph() -> None:
    call, tensors = flatten_item({"x": torch.ones(4, 2).bfloat16(), "n": torch.ones(4).int()}, "")
    other = tuple(t[:2, :1] if t.dim() > 1 else t[:2] for t in tensors)
    samples = Samples(call, tensors, (other,))
    specs = (
        TensorSpec(name="x", dtype="bfloat16", shape=(None, 2)),
        TensorSpec(name="n", dtype="int32", shape=(None,)),
    )
    leaf = Structure(kind="tensor")
    found = as_carried(
        samples,
        Signature(inputs=specs, outputs=(), args=call.args, kwargs=call.kwargs, result=leaf),
    )
    assert [t.dtype for f in found.groups for t in f] == [torch.float32, torch.int32] * 2
    assert len(found.others) == 1
