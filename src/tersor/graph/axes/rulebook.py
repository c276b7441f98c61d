"""What a rule sees of a node, what a rewrite may change, and the tables of both.

A rule says how the labels of a node's inputs become those of its outputs. A rewrite mends the
literals of a node (shapes, group counts) once units are gone. Both are found by the op's name
without namespace and overload; an op without a rule freezes what it meets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from tersor.graph.axes.labels import NONE, Dim, Flags, Labels, Reason, free

Shape = list[Dim]  # the dimensions of one tensor
Result = Shape | list[Shape]
Rule = Callable[["Call"], Result]
Rewrite = Callable[["Edit"], None]

RULES: dict[str, Rule] = {}
REWRITES: dict[str, Rewrite] = {}

# What a width is called: the largest tag that any rule gave to one of its labels.
TAGS = ("features", "neurons", "channels", "groups", "stream", "head_dim", "heads", "experts")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table."""

    def enter(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return enter


def rewrite(*names: str) -> Callable[[Rewrite], Rewrite]:
    """Enter a rewrite in the table."""

    def enter(function: Rewrite) -> Rewrite:
        for name in names:
            REWRITES[name] = function
        return function

    return enter


def op_name(node: fx.Node) -> str:
    """The op's name without overload and the underscore of in-place forms.

    Ops of others keep their namespace: a name alone does not say what they compute.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return getattr(target, "__name__", str(target))
    space, name = target._schema.name.split("::")  # noqa: SLF001
    plain = name if name.startswith("__") else name.removesuffix("_")
    return plain if space == "aten" else f"{space}.{plain}"


def schema_name(node: fx.Node) -> str:
    """The op as people look it up, such as aten.view."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return target._schema.name.replace("::", ".")  # noqa: SLF001
    return getattr(target, "__name__", str(target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return {str(i): a for i, a in enumerate(node.args)}
    found: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):  # noqa: SLF001
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def is_counted(value: Any) -> bool:
    """Whether only the data tell a size of a tensor: how many elements a mask chooses."""
    if not isinstance(value, Tensor):
        return False
    sizes: Sequence[Any] = value.shape
    return any(has_free_unbacked_symbols(s) for s in sizes if not isinstance(s, int))


def size_of(value: Any) -> int:
    """A size as a number; of a symbol the example's; 0 for what only the data tell."""
    if isinstance(value, int):
        return value
    if has_free_unbacked_symbols(value):
        return 0
    node = value.node
    hint = node.maybe_as_int()
    if hint is None:
        hint = node.hint if node.hint is not None else node.shape_env.size_hint(node.expr)
    return int(hint)


def sizes_of(value: Tensor) -> list[int]:
    """A tensor's sizes as numbers."""
    return [size_of(s) for s in value.shape]


@dataclass(slots=True)
class Call:
    """One node for a rule.

    Attributes:
        numbers: Nodes whose values are numbers of units -> the dimension that they count.
        is_barred: Whether the op reads minus infinity at removed units of the dimension it ranks.
    """

    node: fx.Node
    labels: Labels
    shapes: Mapping[fx.Node, Any]
    name: str
    numbers: dict[fx.Node, Dim] = field(default_factory=dict)
    is_barred: bool = False
    args: dict[str, Any] = field(init=False)
    _why: int | None = None

    def __post_init__(self) -> None:
        self.args = arguments(self.node)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def dims(self, name: str) -> Shape:
        """The dimensions of a tensor argument."""
        found = self.maybe(name)
        assert found is not None, f"{self.node.format_node()}: {name} is no tensor"
        return list(found)

    def maybe(self, name: str) -> Shape | None:
        """The dimensions of a tensor argument that may be absent."""
        value = self.args.get(name)
        return self.of(value) if isinstance(value, fx.Node) else None

    def of(self, node: fx.Node) -> Shape | None:
        """The dimensions of any input node; None for what is no tensor."""
        found = self.shapes.get(node)
        if not isinstance(found, list) or (found and isinstance(found[0], list)):
            return None  # no tensor, or several
        return found

    def size(self, value: Any) -> int:
        """A size among the arguments as a number."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        return size_of(value)

    @property
    def out(self) -> list[int]:
        """Sizes of the result."""
        return sizes_of(self.node.meta["val"])

    @property
    def outs(self) -> list[list[int]]:
        """Sizes of several results."""
        return [sizes_of(t) if isinstance(t, Tensor) else [] for t in self.node.meta["val"]]

    def blank(self) -> Result:
        """A result without labels."""
        value = self.node.meta.get("val")
        if isinstance(value, list | tuple):
            return [[free(n) for n in sizes] for sizes in self.outs]
        return [free(n) for n in self.out]

    def why(self, text: str = "") -> int:
        """The number of a reason at this node."""
        return self.labels.reason(Reason(schema_name(self.node), self.node.name, text))

    def _default_why(self) -> int:
        if self._why is None:
            self._why = self.why("meets a dimension that can't shrink")
        return self._why

    def unify(self, a: Dim, b: Dim) -> None:
        """Elements at the same place go together."""
        if a is b or a.rows is b.rows:
            return
        if a.size != b.size:
            self.freeze(a, "sizes differ")
            self.freeze(b, "sizes differ")
            return
        self.labels.unify(a, b, self._default_why())

    def freeze(self, dims: Dim | Sequence[Dim], text: str) -> None:
        """Nothing of these dimensions may be removed."""
        for dim in [dims] if isinstance(dims, Dim) else dims:
            if not dim.is_free:
                self.labels.freeze(dim.rows, self.why(text))

    def freeze_all(self, text: str) -> bool:
        """Nothing of any input may be removed; whether there was anything."""
        shapes = [self.of(node) or [] for node in self.node.all_input_nodes]
        labelled = [d for shape in shapes for d in shape if not d.is_free]
        self.freeze(labelled, text)
        return bool(labelled)

    def inexact(self, dim: Dim) -> None:
        """A statistic over this dimension changes with it."""
        if not dim.is_free:
            self.labels.mark_inexact(dim.rows)

    def tag(self, dim: Dim, tag: str) -> None:
        """Say what kind of width a dimension is."""
        if not dim.is_free:
            self.labels.mark(dim.rows, TAGS.index(tag))

    def dim(self, value: int, rank: int) -> int:
        """A dimension counted from the front."""
        return value % rank if rank else 0

    def chosen(self, dim: Dim, index: Any, text: str) -> None:
        """Elements that an index chooses: those that its numbers count, or none may go."""
        counted = self.numbers.get(index)
        if counted is None:
            self.freeze(dim, text)
        else:
            self.unify(dim, counted)

    def sum_over(self, dims: Sequence[Dim]) -> None:
        """A sum over dimensions needs zeros where units are gone."""
        for dim in dims:
            if not dim.zero:
                self.freeze(dim, "sums over units that are not zero when they are removed")


@dataclass(slots=True)
class Edit:
    """One node of the sliced graph for a rewrite.

    Attributes:
        node: Of the new graph; ``args`` its arguments by name as they were.
        before: The same node of the graph as analysed.
        kept: Which elements of a dimension stay.
        exact_norms: Whether norms keep the statistics of the whole width.
    """

    graph: fx.Graph
    node: fx.Node
    before: fx.Node
    shapes: Mapping[fx.Node, Any]
    kept: Callable[[Dim], Flags]
    exact_norms: bool = False
    args: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.args = arguments(self.node)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def dims(self, name: str) -> Shape:
        """The dimensions of a tensor argument before the cut."""
        source = arguments(self.before)[name]
        found = self.shapes[source]
        assert isinstance(found, list)
        return found

    @property
    def result(self) -> Any:
        """The dimensions of the result before the cut."""
        return self.shapes[self.before]

    def count(self, dim: Dim) -> int:
        """How many elements stay."""
        return int(self.kept(dim).sum())

    def shrinks(self, dim: Dim) -> bool:
        """Whether any element goes."""
        return not dim.is_free and not bool(self.kept(dim).all())

    def set(self, /, **values: Any) -> None:
        """Change arguments by name."""
        self.args.update(values)
        names = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]  # noqa: SLF001
        args = list(self.node.args)
        kwargs = dict(self.node.kwargs)
        for name, value in values.items():
            index = names.index(name)
            if index < len(args):
                args[index] = value
            else:
                kwargs[name] = value
        self.node.args, self.node.kwargs = tuple(args), kwargs

    def replace(self, target: Any, *args: Any) -> None:
        """Another op in this node's place."""
        self.node.target = target
        self.node.args, self.node.kwargs = args, {}
        self.args = arguments(self.node)

    def before_node(self, target: Any, *args: Any, label: str, **kwargs: Any) -> fx.Node:
        """A new op in front of this one."""
        with self.graph.inserting_before(self.node):
            return self.graph.create_node(
                "call_function", target, args, kwargs, name=f"{self.node.name}_{label}"
            )

    def scale(self, factor: float) -> None:
        """Multiply the result by a number; the product has this node's name."""
        if factor == 1.0:
            return
        node = self.node
        plain = self.before_node(node.target, *node.args, label="unscaled", **node.kwargs)
        self.replace(torch.ops.aten.mul.Tensor, plain, factor)


def kept_rows(dim: Dim, labels: Labels, removed: Flags) -> Flags:
    """Which elements of a dimension stay; ``removed`` flags leaves."""
    if dim.is_free:
        return np.ones(dim.size, dtype=np.bool_)
    roots = labels.find(dim.rows)
    gone = np.zeros(dim.rows.shape, dtype=np.bool_)
    products = labels.expanded[roots]
    gone[~products] = removed[roots[~products]]
    for label in np.unique(roots[products]).tolist():
        if any(removed[leaf] for leaf in labels.leaves(label)):
            gone |= roots == label
    gone &= roots != NONE
    return np.logical_not(gone.any(axis=1))
