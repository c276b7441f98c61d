"""Batches: structure, signatures, pools, and data that stays on the device."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from tersor.core.errors import DataError
from tersor.train.tune_batches import (
    Endless,
    ResidentLoader,
    describe,
    draw_pool,
    equal,
    leaves,
    map_leaves,
    place,
    resident,
    signature,
    size_bytes,
    tensors,
)

CPU = torch.device("cpu")
META = torch.device("meta")  # another device that needs no hardware
Pair = namedtuple("Pair", "x y")  # noqa: PYI024 - what a collate function makes of one
PLENTY = 1e9


@dataclass
class Sample:
    x: Tensor
    name: str


class Encoding(UserDict):  # type: ignore[type-arg]
    """As a tokenizer's output: a mapping of its own class."""


def a(*shape: int) -> Tensor:
    return torch.ones(*shape)


BATCHES = [
    a(2),
    (a(2), a(3)),
    [a(2), 5, "text", None],
    {"x": a(2), "y": {"z": [a(3)]}},
    OrderedDict(x=a(2)),
    Encoding(x=a(2)),
    Pair(a(2), 3),
    Sample(a(2), "cat"),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: type(b).__name__)
def test_structure_stays_and_every_tensor_is_changed(batch: Any) -> None:
    changed = map_leaves(batch, lambda v: v + 1 if isinstance(v, Tensor) else v)
    assert type(changed) is type(batch)
    assert signature(changed) == signature(batch)
    assert all(bool((t == 2).all()) for t in tensors(changed))
    assert all(bool((t == 1).all()) for t in tensors(batch))  # the caller's own are as they were
    assert len(tensors(changed)) == len(tensors(batch)) > 0


def test_leaves_are_in_order() -> None:
    assert leaves({"a": [1, (2, 3)], "b": None}) == [1, 2, 3, None]


def test_tensors_that_are_there_stay_the_same_objects() -> None:
    x = a(2)
    assert place({"x": x}, CPU)["x"] is x
    assert place([x], META)[0].device == META


def test_an_object_that_can_move_itself_is_asked_to() -> None:
    class Graph:
        device = CPU

        def to(self, device: torch.device) -> "Graph":
            self.device = device
            return self

    assert place((Graph(), 1), META)[0].device == META


def test_only_images_get_channels_last() -> None:
    image, label, volume = place((a(2, 3, 4, 4), a(2), a(2, 3, 2, 2, 2)), CPU, channels_last=True)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not image.is_contiguous()
    assert label.is_contiguous()
    assert volume.is_contiguous()


@pytest.mark.parametrize(
    "other",
    [
        [a(2), 1],
        (a(3), 1),
        (a(2).double(), 1),
        (a(2), 2),
        (a(2), "1"),
        (a(2), True),
        {0: a(2), 1: 1},
    ],
)
def test_signatures_differ_with_whatever_compiled_work_depends_on(other: Any) -> None:
    assert signature((a(2), 1)) == signature((torch.zeros(2), 1))
    assert signature((a(2), 1)) != signature(other)


def test_descriptions_and_sizes() -> None:
    batch = (a(2, 3), torch.zeros(2, dtype=torch.int64))
    assert describe(batch) == "[2, 3] float32, [2] int64"
    assert size_bytes(batch) == 2 * 3 * 4 + 2 * 8


def test_equal_is_bit_for_bit() -> None:
    assert equal((a(2), 1), [a(2)])
    assert not equal([a(2)], [a(2) + 1e-7])
    assert not equal([a(2)], [a(2).double()])
    assert not equal([a(2)], [a(2), a(2)])


def test_a_pool_is_the_first_batches() -> None:
    source = [a(2) * i for i in range(5)]
    pool = draw_pool(source, 3, PLENTY)
    assert [float(b[0]) for b in pool.batches] == [0, 1, 2]
    assert (pool.kinds, pool.is_static) == (1, True)


def test_a_pool_ends_where_memory_does() -> None:
    assert len(draw_pool([a(2)] * 9, 9, limit_bytes=2 * 8).batches) == 2


def test_the_last_batch_of_an_epoch_may_differ_and_is_left_out() -> None:
    pool = draw_pool([a(4), a(4), a(3)], 9, PLENTY)
    assert pool.is_static
    assert pool.kinds == 2
    assert [len(b) for b in pool.batches] == [4, 4]


def test_more_different_batches_are_no_constant_shape_and_all_stay() -> None:
    pool = draw_pool([a(4), a(3), a(4), a(2)], 9, PLENTY)
    assert (pool.is_static, pool.kinds, len(pool.batches)) == (False, 3, 4)


def test_two_batches_of_two_shapes_have_no_usual_one() -> None:
    assert not draw_pool([a(4), a(3)], 9, PLENTY).is_static


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "found none, wanted at least one batch"),
        (5, "found int, wanted a DataLoader"),
        (a(3), "found Tensor, wanted a DataLoader"),
        ({"x": a(3)}, "found dict, wanted a DataLoader"),
        (iter([a(2)]), "which gives every batch only once"),
        ([("text", 1)], "without a tensor"),
    ],
)
def test_a_source_that_is_none_is_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw_pool(source, 3, PLENTY)


def test_endless_begins_again() -> None:
    stream = Endless([a(1), a(2)])
    assert [len(next(stream)) for _ in range(5)] == [1, 2, 1, 2, 1]


# Data that stays on the device


def dataset(count: int = 23) -> TensorDataset:
    return TensorDataset(torch.arange(count * 2.0).reshape(count, 2), torch.arange(count))


def loaders() -> Iterator[Any]:
    """Loaders of each kind, made anew each time, as generators have a state."""
    subset = Subset(Subset(dataset(), list(range(20, 0, -1))), [3, 1, 4, 15, 9, 2, 6])
    yield "in order", lambda: DataLoader(dataset(), batch_size=4)
    yield "shuffled", lambda: DataLoader(dataset(), batch_size=4, shuffle=True)
    yield "drop last", lambda: DataLoader(dataset(), batch_size=4, shuffle=True, drop_last=True)
    yield (
        "own generator",
        lambda: DataLoader(
            dataset(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7)
        ),
    )
    yield "subset", lambda: DataLoader(subset, batch_size=2, shuffle=True)
    yield (
        "replacement",
        lambda: DataLoader(
            dataset(),
            batch_size=4,
            sampler=RandomSampler(dataset(), replacement=True, num_samples=40),
        ),
    )
    yield (
        "weights",
        lambda: DataLoader(
            dataset(), batch_size=4, sampler=WeightedRandomSampler(torch.rand(23).tolist(), 30)
        ),
    )


@pytest.mark.parametrize("make", [m for _, m in loaders()], ids=[n for n, _ in loaders()])
def test_resident_batches_are_the_loaders_own_in_order_over_epochs(make: Any) -> None:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        wanted = [batch for loader in [make()] for _ in range(3) for batch in loader]
        after = torch.rand(1)
        torch.random.default_generator.manual_seed(3)
        found = resident(make(), CPU, PLENTY).batches
        assert found is not None
        batches = [batch for _ in range(3) for batch in found]
        assert len(batches) == len(wanted)
        assert all(type(b) is type(w) and equal(b, w) for b, w in zip(batches, wanted, strict=True))
        assert torch.equal(torch.rand(1), after)  # and the generator stands where it would


def test_the_shuffled_loader_would_tell_a_wrong_order() -> None:
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    first, second = list(loader), list(loader)
    assert not all(equal(x, y) for x, y in zip(first, second, strict=True))


def test_length_is_the_loaders() -> None:
    loader = DataLoader(dataset(), batch_size=4)
    found = resident(loader, CPU, PLENTY).batches
    assert isinstance(found, ResidentLoader)
    assert len(found) == len(loader) == 6


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(2) + index


class Noisy(TensorDataset):
    """It looks like one, and gives other items each time."""

    def __getitem__(self, index: Any) -> Any:
        return tuple(t + torch.rand(1) for t in super().__getitem__(index))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            DataLoader(Augmented(), batch_size=2),
            "the data set is a Augmented, whose items may differ",
        ),
        (DataLoader(Noisy(a(4, 2)), batch_size=2), "the data set is a Noisy"),
        (DataLoader(dataset(), batch_size=None), "makes no batches"),
        (DataLoader(dataset(), batch_size=2, collate_fn=list), "collate function of its own"),
        ([a(2)], "on cpu already"),
        ({1: a(2)}.values(), "no DataLoader and no list"),
    ],
)
def test_what_may_change_from_epoch_to_epoch_is_not_kept(source: Any, reason: str) -> None:
    found = resident(source, CPU, PLENTY)
    assert found.batches is None
    assert reason in found.reason


def test_what_does_not_fit_is_not_kept() -> None:
    assert "more than the 0.00 MB" in resident([a(100)], META, limit_bytes=399).reason
    loader = DataLoader(TensorDataset(a(100)), batch_size=2)
    assert "the data takes 0.00 MB" in resident(loader, META, limit_bytes=399).reason
    assert resident([a(100)], META, limit_bytes=400).batches is not None
    assert resident(loader, META, limit_bytes=400).batches is not None


def test_a_list_is_moved_once() -> None:
    found = resident([(a(2), 1), (a(3), 2)], META, PLENTY).batches
    assert isinstance(found, list)
    assert [(b[0].device, b[1]) for b in found] == [(META, 1), (META, 2)]
