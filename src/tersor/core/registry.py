"""Names to plug-ins, through entry points; only ``api`` and ``train`` resolve them."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tersor.core.errors import ConfigError

METHODS = "tersor.methods"
BACKENDS = "tersor.backends"
# What this distribution itself brings: found also where it runs without being installed.
_BUILT_IN = {
    METHODS: {
        "activation": "tersor.methods.activation:Activation",
        "codebook": "tersor.methods.codebook:Codebook",
        "datafree": "tersor.methods.datafree:Datafree",
        "depth": "tersor.methods.depth:Depth",
        "lowrank": "tersor.methods.lowrank:Lowrank",
        "prune": "tersor.methods.prune:Prune",
        "quantize": "tersor.methods.quantize:Quantize",
        "sparsify": "tersor.methods.sparsify:Sparsify",
    },
    BACKENDS: {
        "inductor": "tersor.backends.inductor:InductorBackend",
        "onnxruntime": "tersor.backends.onnxruntime:ONNXRuntimeBackend",
        "openvino": "tersor.backends.openvino:OpenVINOBackend",
    },
}


def names(group: str) -> list[str]:
    """The names of all plug-ins of a group, sorted."""
    return sorted({*_BUILT_IN[group], *(e.name for e in entry_points(group=group))})


def is_own(group: str, name: str) -> bool:
    """Whether this distribution brings it."""
    return name in _BUILT_IN[group]


def resolve(group: str, name: str) -> Any:
    """The class behind a name.

    Raises:
        ConfigError: No plug-in of that name; the message lists those there are. Or one of another
            distribution that does not load.
    """
    if name in _BUILT_IN[group]:
        return EntryPoint(name, _BUILT_IN[group][name], group).load()
    for entry in entry_points(group=group):
        if entry.name == name:
            return _loaded(entry)
    kind = group.removeprefix("tersor.").removesuffix("s")
    raise ConfigError(f"no {kind} is called {name!r}; there are {names(group)}")


def backend(name: str, device: str = "cpu") -> Any:
    """The backend of a name; one that runs on several kinds of devices for this one.

    Raises:
        ConfigError: No backend of that name.
    """
    cls = resolve(BACKENDS, name)
    return cls.for_device(device) if hasattr(cls, "for_device") else cls()


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        origin = "" if entry.dist is None else f" of {entry.dist.name} {entry.dist.version}"
        raise ConfigError(
            f"{entry.group}: {entry.name!r}{origin} does not load from {entry.value}: {error}; mend or "
            "uninstall that package"
        ) from error
