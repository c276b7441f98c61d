"""Reads ``.pt2`` files of torch.export without running what a file brings along.

``torch.export.load`` unpickles the sample inputs of a file (anything, where plain tensors fail),
evaluates its size expressions as Python, runs its guards, and looks up any function of torch by
name. So a copy is made that holds only what the model needs, each part checked, and that is read.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tersor.core.errors import CaptureError

_AGAIN = (
    "export it again with torch.export.save, or load it yourself with torch.export.load if you "
    "trust it, and pass the ExportedProgram"
)
# Sizes as torch writes them: constructors of its own and sympy's arithmetic around symbols.
_SYMBOL = re.compile(r"[a-z]{1,3}\d+", re.ASCII)
_CONSTRUCTORS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs",
        "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "Eq", "Ne", "Lt",
        "StrictGreaterThan", "Le", "Gt", "Ge", "And", "Or", "Not", "FloorDiv", "CleanDiv",
        "CeilDiv", "PythonMod", "ModularIndexing", "PowByNatural", "Where", "IntTrueDiv",
        "FloatTrueDiv", "ToFloat", "FloorToInt", "CeilToInt", "TruncToInt", "RoundToInt",
        "BooleanTrue", "BooleanFalse", "true", "false", "int_oo", "oo", "floor", "ceiling",
    }
)  # fmt: skip
_PLAIN = (
    ast.Expression, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_OPERATOR = re.compile(r"(torch\.ops\.\w+\.\w+\.\w+|_operator\.\w+|math\.\w+|torch\.sym_\w+)")
_FORBIDDEN_OPS = re.compile(r"torch\.ops\.(aten\.from_file|profiler|debug|inductor)\b")
_FORBIDDEN_OPERATORS = ("attrgetter", "methodcaller", "itemgetter", "call")
# Keys of nested containers that name a Python object to import.
_IMPORTS = ("default_factory_module", "__enum__")


def read_pt2(path: Path) -> torch.export.ExportedProgram:
    """The program in a ``.pt2`` file; nothing in it is unpickled or evaluated.

    Raises:
        CaptureError: No such file, no archive of ``torch.export.save``, or one that can't be read
            without unpickling or evaluating what it holds.
    """
    if not path.is_file():
        raise CaptureError(f"{path}: no such file; wanted a .pt2 that torch.export.save wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            plain = _plain_copy(archive, str(path))
        return torch.export.load(plain)
    except zipfile.BadZipFile as error:
        raise CaptureError(
            f"{path}: {error}; wanted a .pt2 that torch.export.save wrote"
        ) from error
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{path}: torch {torch.__version__} can't read it ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "export the model again with this version"
        ) from error


def _plain_copy(archive: zipfile.ZipFile, where: str) -> io.BytesIO:
    names = archive.namelist()
    if not any(name.endswith("/models/model.json") for name in names):
        raise CaptureError(
            f"{where}: holds no exported program (models/model.json); wanted what "
            "torch.export.save writes since version 2.8"
        )
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as plain:
        for name in names:
            content = _checked(name, archive.read(name), where)
            if content is not None:
                plain.writestr(zipfile.ZipInfo(name), content)
    copy.seek(0)
    return copy


def _checked(name: str, content: bytes, where: str) -> bytes | None:
    """What the copy holds in that entry; None: nothing."""
    inside = name.partition("/")[2]
    if inside.startswith("data/sample_inputs/"):
        return b""  # a pickle, which the program does not need
    if inside.startswith("data/constants/") and not inside.endswith(".json"):
        kind = inside.rpartition("/")[2]
        if not kind.startswith("tensor_"):
            raise CaptureError(f"{where}: entry {inside} is a pickled object; {_AGAIN}")
    if inside.endswith("_config.json"):
        _check_payloads(json.loads(content), where)
    if inside.startswith("models/"):
        return _checked_model(content, where)
    return None if inside.startswith(("data/aotinductor/", "extra/")) else content


def _check_payloads(config: Any, where: str) -> None:
    for name, row in config["config"].items():
        if row["use_pickle"]:
            raise CaptureError(f"{where}: tensor {name} is stored as a pickle; {_AGAIN}")


def _checked_model(content: bytes, where: str) -> bytes:
    text = content.decode()
    found = next((word for word in _IMPORTS if word in text), None)
    if found is not None:
        raise CaptureError(f"{where}: its containers import Python objects ({found}); {_AGAIN}")
    model = json.loads(text)
    for key, value in _leaves(model, ""):
        if key == "expr_str" and not _is_arithmetic(value):
            raise CaptureError(f"{where}: {value!r} is no size expression; {_AGAIN}")
        if key == "target" and not _is_operator(value):
            raise CaptureError(f"{where}: {value!r} is no op of a plain graph; {_AGAIN}")
    model["guards_code"] = []
    return json.dumps(model).encode()


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts with the key under which they are."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    elif isinstance(value, str):
        yield key, value


def _is_arithmetic(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_plain(node) for node in ast.walk(tree))


def _is_plain(node: ast.AST) -> bool:
    """Numbers, the names of symbols, and calls of known constructors by their bare names."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _CONSTRUCTORS
    if isinstance(node, ast.Name):
        return node.id in _CONSTRUCTORS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _SYMBOL.fullmatch(node.value) is not None
    return isinstance(node, _PLAIN)


def _is_operator(text: str) -> bool:
    is_known = _OPERATOR.fullmatch(text) and not _FORBIDDEN_OPS.match(text)
    if text.startswith("torch.ops.higher_order."):
        return True  # named when the graph is read
    return bool(is_known) and text.rpartition(".")[2] not in _FORBIDDEN_OPERATORS
