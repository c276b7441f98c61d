"""What is gone with a branch has no choice left."""

from tersor.core.levels import gone_with, settled

INSIDE = {"block": ("a", "b", "branch", "w"), "branch": ("b",)}
NATIVE = {"a": "f32", "b": "f32", "w": 8, "branch": 2}


def test_what_goes_with_branches() -> None:
    assert gone_with({"block": 2, "a": "int8"}, INSIDE) == frozenset()
    assert gone_with({"branch": 1}, INSIDE) == {"b"}
    assert gone_with({"block": 0}, INSIDE) == {"a", "b", "branch", "w"}


def test_choices_inside_are_taken_back() -> None:
    chosen = {"a": "int8", "b": "int8", "w": 4, "branch": 0, "block": 2, "c": "int8"}
    assert settled(chosen, INSIDE, NATIVE) == {**chosen, "b": "f32"}
    assert settled({**chosen, "block": 1}, INSIDE, NATIVE) == {**NATIVE, "block": 1, "c": "int8"}
    assert settled(chosen, {}, NATIVE) == chosen
