"""Calls go to the build that fits: routed, padded, cut back, profiled in their mix."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tersor.core.errors import ConfigError, DataError
from tersor.core.jsonable import from_json, to_json
from tersor.core.records import MAX_BUCKETS, Bucket, BuildChoice, Signature, Structure, TensorSpec
from tersor.graph.routed import Routed, routed, unpaddable

LEAF, NONE = Structure(kind="tensor"), Structure(kind="dict")
Arrays = dict[str, NDArray[Any]]


def spec(name: str, *dynamic: str, dtype: str = "float32") -> TensorSpec:
    shape = tuple(20 if symbol else 3 for symbol in dynamic)
    limits = tuple((2, 40, 1) if symbol else (0, 0, 0) for symbol in dynamic)
    return TensorSpec(
        name=name, dtype=dtype, shape=(None, *shape), dynamic=("", *dynamic),
        limits=((0, 0, 0), *limits),
    )  # fmt: skip


def signature(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Signature:
    outputs = tuple(replace(o, limits=()) for o in outputs)
    return Signature(inputs=inputs, outputs=outputs, args=LEAF, kwargs=NONE, result=LEAF)


TEXT = signature(
    (spec("ids", "length_1", dtype="int64"), spec("mask", "length_1"), spec("extra", "")),
    (spec("tokens", "length_1", ""), TensorSpec(name="mean", dtype="float32", shape=(None, 3))),
)
IMAGE = signature((spec("x", "", "height_1", "width_1"),), (spec("y", "height_1*width_1"),))


@dataclass
class Fake:
    """Remembers what it was run on; gives the ids back, and the sizes."""

    name: str = "open"
    made: dict[str, "Fake"] = field(default_factory=dict)
    seen: list[Arrays] = field(default_factory=list)

    def at(self, shapes: dict[str, tuple[int, ...]]) -> "Fake":
        name = "x".join(str(n) for n in next(iter(shapes.values()))[1:])
        self.made[name] = Fake(name)
        return self.made[name]

    def run(self, inputs: Arrays) -> Arrays:
        self.seen.append(inputs)
        if "x" in inputs:
            return {"y": inputs["x"].reshape(len(inputs["x"]), -1)}
        ids = inputs["ids"]
        return {
            "tokens": np.repeat(ids[..., None].astype(np.float32), 3, axis=2),
            "mean": np.full((len(ids), 3), inputs["mask"].sum(), np.float32),
        }

    def profile(self) -> dict[str, float]:
        return {"op": float(len(self.seen)), self.name: 1.0}

    def serialize(self) -> dict[str, bytes]:
        return {"model": self.name.encode()}


def bucket(size: int, least: int) -> Bucket:
    return Bucket(sizes={"length_1": size}, least={"length_1": least})


PADDED = BuildChoice(
    backend="fake", batch=2, shapes="padded", buckets=(bucket(8, 4), bucket(16, 9), bucket(32, 30))
)


def text(length: int) -> Arrays:
    return {
        "ids": np.arange(1, 2 * length + 1).reshape(2, length),
        "mask": np.ones((2, length), np.float32),
        "extra": np.ones((2, 3), np.float32),
    }


@pytest.mark.parametrize(
    ("length", "goes"),
    [(3, "open"), (4, "8"), (8, "8"), (9, "16"), (16, "16"), (17, "open"), (29, "open"), (30, "32"),
     (32, "32"), (33, "open")],
)  # fmt: skip
def test_calls_go_to_the_build_that_takes_them(length: int, goes: str) -> None:
    fake = Fake()
    build = Routed(fake, TEXT, PADDED)
    given = text(length)
    found = build.run(given)
    builds = {"open": fake, **fake.made}
    assert [name for name, one in builds.items() if one.seen] == [goes]
    (seen,) = builds[goes].seen
    built = length if goes == "open" else int(goes)
    assert {n: a.shape for n, a in seen.items()} == {
        "ids": (2, built), "mask": (2, built), "extra": (2, 3)
    }  # fmt: skip
    for name in ("ids", "mask"):  # what is filled in is zero, behind what was there
        assert np.array_equal(seen[name][:, :length], given[name])
        assert not seen[name][:, length:].any()
        assert seen[name].dtype == given[name].dtype
    assert np.array_equal(found["tokens"][..., 0], given["ids"])
    assert found["tokens"].shape == (2, length, 3)
    assert np.array_equal(found["mean"], np.full((2, 3), 2 * length, np.float32))


def test_two_sizes_go_to_their_own_build() -> None:
    sizes = [{"height_1": 4, "width_1": 6}, {"height_1": 6, "width_1": 4}]
    choice = BuildChoice(
        backend="fake", shapes="exact", buckets=tuple(Bucket(sizes=s, least=s) for s in sizes)
    )
    assert choice.describe() == "fake f32, 1 thread(s), exact at 4x6 | 6x4"
    build = Routed(Fake(), IMAGE, choice)
    wanted = {(4, 6): 0, (6, 4): 1, (4, 4): -1, (6, 6): -1, (3, 6): -1}
    assert {hw: build.route({"height_1": hw[0], "width_1": hw[1]}) for hw in wanted} == wanted
    x = np.arange(2.0 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    assert np.array_equal(build.run({"x": x})["y"], x.reshape(2, -1))


def test_a_profile_is_of_the_mix_of_calls() -> None:
    build = Routed(Fake(), TEXT, PADDED)
    for length in (8, 7, 16, 40):
        build.run(text(length))
    # Half of the calls took a build that saw two, a quarter each one that saw one.
    assert build.profile() == {"op": 2 / 2 + 1 / 4 + 1 / 4, "8": 0.5, "16": 0.25, "open": 0.25}
    assert build.serialize() == {"model": b"open"}


def test_a_choice_of_open_sizes_is_the_build_itself() -> None:
    fake = Fake()
    assert routed(fake, TEXT, BuildChoice(backend="fake")) is fake
    assert isinstance(routed(fake, TEXT, PADDED), Routed)


def test_what_can_not_be_padded() -> None:
    assert unpaddable(TEXT) == ""
    assert "2 sizes vary (height_1, width_1), wanted one" in unpaddable(IMAGE)
    pooled = signature(TEXT.inputs, (spec("y", "length_1//2"),))
    assert unpaddable(pooled).startswith("dimension 1 of output 'y' is length_1//2, wanted")
    with pytest.raises(ConfigError, match=r"length_1//2.*choose shapes=exact or open"):
        Routed(Fake(), pooled, PADDED)
    exact = replace(PADDED, shapes="exact", buckets=(bucket(8, 8),))
    assert Routed(Fake(), pooled, exact).route({"length_1": 8}) == 0


def test_buckets_that_do_not_fit_the_model() -> None:
    other = replace(PADDED, buckets=(Bucket(sizes={"width_1": 8}, least={"width_1": 8}),))
    with pytest.raises(ConfigError, match=r"wanted a size for each of \['length_1'\]"):
        Routed(Fake(), TEXT, other)
    with pytest.raises(DataError, match="found size 41, wanted 2 to 40"):
        Routed(Fake(), TEXT, replace(PADDED, buckets=(bucket(41, 30),)))
    with pytest.raises(ConfigError, match="fake makes no builds of single sizes"):
        Routed(object(), TEXT, PADDED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": "padded"}, r"shapes=padded: found 0, wanted 1 to 16 buckets"),
        ({"buckets": (bucket(8, 8),)}, r"shapes=open: found 1, wanted no bucket"),
        ({"shapes": "exact", "buckets": (bucket(8, 7),)}, r"found a bucket that pads"),
        ({"shapes": "padded", "buckets": (bucket(8, 8),) * (MAX_BUCKETS + 1)}, r"found 17, wanted"),
    ],
)
def test_choices_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildChoice(backend="fake", **fields)


@pytest.mark.parametrize(
    ("sizes", "least"), [({}, {}), ({"n": 4}, {}), ({"n": 4}, {"n": 5}), ({"n": 4}, {"n": 0})]
)
def test_buckets_that_contradict_themselves(sizes: dict[str, int], least: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="wanted the same symbols in both and 1 <= least <= size"):
        Bucket(sizes=sizes, least=least)


def test_a_choice_comes_back_from_json() -> None:
    assert from_json(BuildChoice, to_json(PADDED)) == PADDED
    old = {"backend": "openvino", "threads": 2}  # written before there were shapes
    assert from_json(BuildChoice, old) == BuildChoice(backend="openvino", threads=2)
