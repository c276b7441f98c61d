import ast
import re
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import DataError
from tersor.core.records import Signature, Structure, TensorSpec
from tersor.core.structure import NamedOutput, bind, count_leaves, flatten, places, unflatten

T = Structure(kind="tensor")
NONE = Structure(kind="none")


def tuple_of(*children: Structure) -> Structure:
    return Structure(kind="tuple", children=children)


def dict_of(**children: Structure) -> Structure:
    return Structure(kind="dict", keys=tuple(children), children=tuple(children.values()))


def object_of(type_name: str, **children: Structure) -> Structure:
    fields = {"keys": tuple(children), "children": tuple(children.values())}
    return Structure(kind="object", type_name=type_name, **fields)


def constant(value: Any) -> Structure:
    return Structure(kind="constant", value=value)


def build(shape: Any, leaves: list[Any]) -> tuple[Structure, Any]:
    """A structure and a value of it, side by side, by a definition of its own."""
    kind, parts = shape
    if kind == "tensor":
        leaves.append(np.full(2, len(leaves)))
        return T, leaves[-1]
    if kind == "none":
        return NONE, None
    if kind == "constant":
        return constant(parts), parts
    built = [build(p, leaves) for p in parts]
    children = tuple(s for s, _ in built)
    values = [v for _, v in built]
    if kind == "dict":
        keys = tuple(f"k{i}" for i in range(len(values)))
        return Structure(kind="dict", keys=keys, children=children), dict(
            zip(keys, values, strict=True)
        )
    return Structure(kind=kind, children=children), (tuple if kind == "tuple" else list)(values)


SHAPES = st.recursive(
    st.just(("tensor", None))
    | st.just(("none", None))
    | st.tuples(st.just("constant"), st.integers() | st.text() | st.booleans()),
    lambda s: st.tuples(st.sampled_from(["tuple", "list", "dict"]), st.lists(s, max_size=3)),
    max_leaves=10,
)


@given(SHAPES)
def test_unflatten_is_the_inverse_of_flatten(shape: Any):
    leaves: list[Any] = []
    structure, value = build(shape, leaves)
    flat = flatten(structure, value)
    assert [id(x) for x in flat] == [id(x) for x in leaves]
    assert count_leaves(structure) == len(leaves)
    again = unflatten(structure, flat)
    # repr tells tuples from lists, and shows the arrays' values.
    assert repr(again) == repr(value)


def test_order_is_the_structures_not_the_callers():
    structure = dict_of(b=T, a=T)
    one, two = np.zeros(1), np.ones(1)
    flat = flatten(structure, {"a": two, "b": one})
    assert flat[0] is one
    assert flat[1] is two


@pytest.mark.parametrize("kind", [OrderedDict, UserDict])
def test_any_mapping_is_a_dictionary(kind: Any):
    assert len(flatten(dict_of(a=T), kind({"a": np.zeros(1)}))) == 1


@pytest.mark.parametrize(
    ("structure", "value", "message"),
    [
        (T, None, "x: found None, wanted a tensor"),
        (T, 3, "x: found a int, wanted a tensor"),
        (T, [np.zeros(1)], "x: found a list, wanted a tensor"),
        (NONE, np.zeros(1), "x: found a ndarray, but the model was captured with None"),
        (constant(3), 4, "x: found 4, but the model was captured with 3; leave it out"),
        (constant(1), True, "x: found True, but the model was captured with 1"),
        (constant("a"), np.zeros(1), "x: found a ndarray, but .* captured with 'a'"),
        (tuple_of(T, T), np.zeros(1), "x: found a ndarray, wanted a tuple of 2 items"),
        (tuple_of(T, T), [np.zeros(1)], "x: found 1 items, wanted 2"),
        (tuple_of(T, tuple_of(T)), (np.zeros(1), (None,)), r"x\[1\]\[0\]: found None"),
        (dict_of(a=T), [np.zeros(1)], r"x: found a list, wanted a mapping with keys \['a'\]"),
        (
            dict_of(a=T, b=T),
            {"a": np.zeros(1)},
            r"x: keys \['b'\] are missing; wanted \['a', 'b'\]",
        ),
        (dict_of(a=T), {"a": np.zeros(1), "z": 1}, r"x: unknown keys \['z'\]; wanted \['a'\]"),
        (dict_of(a=tuple_of(T)), {"a": (3,)}, r"x\['a'\]\[0\]: found a int"),
        (object_of("Out", a=T), 3, r"x: found a int, wanted a Out with fields \['a'\]"),
    ],
)
def test_a_value_of_another_structure_is_refused(structure: Any, value: Any, message: str):
    with pytest.raises(DataError, match=message):
        flatten(structure, value, "x")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_wrong_number_of_tensors_is_refused(n: int):
    with pytest.raises(DataError, match=f"found {n} tensors, wanted 2"):
        unflatten(tuple_of(T, T), [np.zeros(1)] * n)


def test_what_holds_no_tensor_may_be_left_out():
    structure = dict_of(a=T, flag=constant(True), extra=NONE)
    assert len(flatten(structure, {"a": np.zeros(1)})) == 1
    assert len(flatten(structure, {"a": np.zeros(1), "flag": True, "extra": None})) == 1
    assert len(flatten(dict_of(a=T), {"a": np.zeros(1), "unused": None})) == 1


@dataclass
class Batch:
    ids: Any
    mask: Any
    label: Any = None


class Plain:
    def __init__(self, ids: Any) -> None:
        self.ids = ids


def test_objects_are_read_by_field():
    structure = object_of("Batch", ids=T, mask=T)
    ids, mask = np.zeros(1), np.ones(1)
    for value in (Batch(ids, mask), {"mask": mask, "ids": ids}):
        flat = flatten(structure, value)
        assert flat[0] is ids
        assert flat[1] is mask
    assert flatten(object_of("Plain", ids=T), Plain(ids))[0] is ids
    with pytest.raises(DataError, match=r"unknown keys \['label'\]"):
        flatten(structure, Batch(ids, mask, label=mask))


def test_an_output_object_is_reached_by_name_attribute_and_position():
    structure = object_of("ModelOutput", logits=T, loss=NONE, states=tuple_of(T, T))
    out = unflatten(structure, [np.zeros(1), np.ones(1), np.ones(2)])
    assert isinstance(out, NamedOutput)
    assert list(out) == ["logits", "states"]
    assert out["logits"] is out.logits is out[0] is out.to_tuple()[0]
    assert out[1] is out.states
    assert out[-1] is out[:2][1]
    assert out.loss is None
    assert "loss" not in out
    with pytest.raises(AttributeError, match=r"ModelOutput has no field 'pooled'.*logits"):
        _ = out.pooled
    with pytest.raises(IndexError):
        _ = out[2]
    assert flatten(structure, out)[0] is out.logits


def signature(args: Structure, kwargs: Structure, names: tuple[str, ...]) -> Signature:
    spec = TensorSpec(name="x", dtype="float32", shape=(None,))
    return Signature(
        inputs=(spec,), outputs=(), args=args, kwargs=kwargs, result=T, parameter_names=names
    )


NAMES = ("ids", "mask", "types", "flag")
A, B, C = np.zeros(1), np.zeros(1), np.zeros(1)
BY_POSITION = signature(tuple_of(T, T), dict_of(), NAMES)
BY_NAME = signature(tuple_of(), dict_of(ids=T, mask=T), NAMES)
MIXED = signature(tuple_of(T), dict_of(mask=T, flag=constant(True)), NAMES)


@pytest.mark.parametrize("captured", [BY_POSITION, BY_NAME, MIXED])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A, B), {}),
        ((A,), {"mask": B}),
        ((), {"ids": A, "mask": B}),
        ((), {"mask": B, "ids": A}),
        ((A, B, None), {}),
        ((A, B), {"types": None}),
    ],
)
def test_every_way_to_pass_arguments_gives_the_same_tensors(captured: Any, args: Any, kwargs: Any):
    flat = bind(captured, args, kwargs)
    assert len(flat) == 2
    assert flat[0] is A
    assert flat[1] is B


def test_constants_may_be_passed_but_not_changed():
    assert len(bind(MIXED, (A, B), {"flag": True})) == 2
    assert len(bind(MIXED, (A, B, None, True), {})) == 2
    with pytest.raises(DataError, match=r"flag: found False, but .* captured with True"):
        bind(MIXED, (A, B), {"flag": False})


@pytest.mark.parametrize("captured", [BY_POSITION, BY_NAME, MIXED])
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"argument 'ids' is missing; the model was captured with \['ids', 'mask'"),
        ((A,), {}, "argument 'mask' is missing"),
        ((), {"mask": B}, "argument 'ids' is missing"),
        ((A, B), {"typo": C}, r"arguments \['typo'\] are unknown.*leave them out"),
        ((A, B, C), {}, r"arguments \['types'\] are unknown"),
        ((A, B), {"ids": C}, r"arguments \['ids'\] are given by position and by name"),
        ((A, B, None, None, None), {}, "found 5 positional arguments, wanted at most 4"),
        ((A, 3), {}, "mask: found a int, wanted a tensor"),
    ],
)
def test_bad_calls_are_refused(captured: Any, args: Any, kwargs: Any, message: str):
    if captured is MIXED and len(args) > 3:
        args = (*args[:3], True, None)
    with pytest.raises(DataError, match=message):
        bind(captured, args, kwargs)


def test_without_parameter_names_positions_count():
    captured = signature(tuple_of(T, T), dict_of(), ())
    flat = bind(captured, (A, B), {})
    assert flat[0] is A
    assert flat[1] is B
    with pytest.raises(DataError, match="found 3 positional arguments, wanted at most 2"):
        bind(captured, (A, B, C), {})
    with pytest.raises(DataError, match="argument 'argument 2' is missing"):
        bind(captured, (A,), {})


def test_nested_arguments_name_the_place():
    captured = signature(tuple_of(dict_of(ids=T, pair=tuple_of(T, T))), dict_of(), ("batch",))
    flat = bind(captured, ({"ids": A, "pair": [B, C]},), {})
    assert [id(x) for x in flat] == [id(A), id(B), id(C)]
    with pytest.raises(DataError, match=r"batch\['pair'\]\[1\]: found None"):
        bind(captured, ({"ids": A, "pair": [B, None]},), {})


@given(st.lists(SHAPES, max_size=3), SHAPES)
def test_places_are_where_errors_look(shapes: list[Any], named: Any) -> None:
    """One for each tensor, in order; followed into a call, a place leads to that very tensor."""
    leaves: list[Any] = []
    pairs = [build(shape, leaves) for shape in shapes]
    structure, value = build(named, leaves)
    signature = Signature(
        args=tuple_of(*(s for s, _ in pairs)),
        kwargs=dict_of(other=structure),
        inputs=(),
        outputs=(),
        result=T,
        parameter_names=tuple(f"a{i}" for i in range(len(pairs))),
    )
    call = {**{f"a{i}": v for i, (_, v) in enumerate(pairs)}, "other": value}
    found = places(signature)
    assert len(found) == len(leaves)
    for place, leaf in zip(found, leaves, strict=True):
        name, *rest = re.split(r"\[", place)
        at = call[name]
        for key in rest:
            at = at[ast.literal_eval(key.removesuffix("]"))]
        assert at is leaf
