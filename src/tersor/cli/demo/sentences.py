"""English sentences that every Python ships: paragraphs of the standard library's docstrings.

Which part a sentence falls into depends on its module and the seed alone, by hash: no module is in
two parts, and another Python version, which has other modules, moves none of the common ones.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from tersor.core.data import SPLITS, Split
from tersor.core.errors import DataError

SHORTEST = 26  # characters; below that it is a title or a type, no sentence
SHARES: Mapping[Split, float] = {"calibration": 0.3, "search": 0.2, "test": 0.5}
# Debian splits these from Python or patches them, newer Pythons drop some: a machine may lack them.
NOT_EVERYWHERE = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"}
)
NOT_TEXT = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages"})


def split_sentences(counts: Mapping[Split, int], seed: int = 0) -> dict[Split, list[str]]:
    """Draw sentences for each part, without replacement and from disjoint modules.

    Raises:
        DataError: The standard library's sources are absent or hold too few sentences.
    """
    drawn: dict[Split, dict[str, str]] = {part: {} for part in SPLITS}
    for sentence, module in standard_library().items():
        drawn[part_of(module, seed)][_hash(seed, sentence)] = sentence
    for part, count in counts.items():
        if len(drawn[part]) < count:
            raise DataError(
                f"standard library in {sysconfig.get_path('stdlib')}: found {len(drawn[part])} "
                f"sentences for the {part} part, wanted {count}; ask for fewer, or use a Python "
                "that ships its sources"
            )
    return {
        part: [drawn[part][key] for key in sorted(drawn[part])[:n]] for part, n in counts.items()
    }


def part_of(module: str, seed: int = 0) -> Split:
    """The part that all sentences of a top-level module belong to."""
    position = int(_hash(seed, module)[:8], 16) / 16**8
    for part in SPLITS:
        position -= SHARES[part]
        if position < 0:
            return part
    return SPLITS[-1]


@lru_cache(maxsize=1)  # reading some 600 files takes seconds
def standard_library() -> Mapping[str, str]:
    """Sentence -> top-level module of its first appearance, in the order of the file names."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = sys.stdlib_module_names - NOT_EVERYWHERE
    sentences: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if module in modules and not NOT_TEXT.intersection(parts):
            for sentence in _paragraphs(path.read_bytes()):
                sentences.setdefault(sentence, module)
    return MappingProxyType(sentences)


def _paragraphs(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text) >= SHORTEST and ">>>" not in text:
                    yield text


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()
