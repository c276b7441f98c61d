"""All models of the zoo by name."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from tests.conformance.zoo import families, hf_zoo, timm_zoo, torchvision_zoo
from tests.conformance.zoo.entry import ZooModel

SOURCES = ("families", "transformers", "torchvision", "timm")


def zoo() -> dict[str, ZooModel]:
    """Every entry; nothing is imported or built before ``build`` is called."""
    return {entry.name: entry for entry in _entries()}


def _entries() -> Iterator[ZooModel]:
    yield from families.entries()
    yield from hf_zoo.entries()
    yield from torchvision_zoo.entries()
    yield from timm_zoo.entries()


def select(patterns: Sequence[str]) -> list[ZooModel]:
    """Entries whose name or source matches a pattern; all where there is none.

    Raises:
        KeyError: A pattern matches nothing.
    """
    found: dict[str, ZooModel] = {}
    everything = zoo()
    for pattern in patterns or ["*"]:
        hits = {n: e for n, e in everything.items() if fnmatch(n, pattern) or e.source == pattern}
        if not hits:
            raise KeyError(
                f"no model is called {pattern!r}; names look like 'torchvision/vit_b_16'"
            )
        found |= hits
    return list(found.values())
