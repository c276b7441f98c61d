from importlib.metadata import EntryPoint
from typing import Any

import pytest

from tersor.core import registry
from tersor.core.errors import ConfigError


def test_built_in_names_are_listed():
    assert "quantize" in registry.names(registry.METHODS)
    assert "openvino" in registry.names(registry.BACKENDS)


@pytest.mark.parametrize(
    ("group", "kind"), [(registry.METHODS, "method"), (registry.BACKENDS, "backend")]
)
def test_an_unknown_name_lists_those_there_are(group: Any, kind: Any):
    known = registry.names(group)
    with pytest.raises(ConfigError, match=rf"no {kind} is called 'magic'; there are .*{known[0]}"):
        registry.resolve(group, "magic")


def test_a_plug_in_of_another_distribution_is_found(monkeypatch: pytest.MonkeyPatch):
    plugin = EntryPoint("fast", "json:JSONDecoder", registry.METHODS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin] * (group == plugin.group))
    import json

    assert registry.resolve(registry.METHODS, "fast") is json.JSONDecoder
    assert registry.names(registry.METHODS) == [
        "activation", "codebook", "datafree", "depth", "fast", "lowrank", "prune", "quantize", "sparsify",
    ]  # fmt: skip
    assert registry.names(registry.BACKENDS) == ["inductor", "onnxruntime", "openvino"]


def test_a_built_in_name_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch):
    plugin = EntryPoint("builtin", "json:JSONDecoder", registry.METHODS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin] * (group == plugin.group))
    monkeypatch.setitem(registry._BUILT_IN[registry.METHODS], "builtin", "json:JSONEncoder")
    import json

    assert registry.resolve(registry.METHODS, "builtin") is json.JSONEncoder


def test_own_plug_ins_are_told_from_others():
    assert registry.is_own(registry.METHODS, "quantize")
    assert not registry.is_own(registry.METHODS, "openvino")
    assert not registry.is_own(registry.METHODS, "fast")
