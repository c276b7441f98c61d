"""Units are cut out of a model in place, or set to zero in it; both can be undone.

Parameters keep their identity (``p.data`` is replaced), so that the groups of optimizers and schedulers
stay valid; what modules know of their own sizes (``in_features``, ``num_features`` ...) follows.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tersor.train.groups import Group

_NAMES: Mapping[type[nn.Module], tuple[str, ...]] = {  # of the sizes of the weight, in order
    nn.Linear: ("out_features", "in_features"),
    nn.GroupNorm: ("num_channels",),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
}
Kept = Mapping[str, Tensor]  # group -> indices of the units that stay, ascending
Selection = tuple[int, Tensor]  # dimension, indices of the elements that stay


@dataclass
class Cut:
    """What was cut, so that states of the same shape can follow, and how it is undone.

    Attributes:
        selections: Name of a tensor -> what stays of each of its dimensions that changed.
    """

    selections: Mapping[str, tuple[Selection, ...]]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back as it was."""
        while self._undo:
            self._undo.pop()()


def selections_of(groups: Sequence[Group], kept: Kept) -> dict[str, tuple[Selection, ...]]:
    """What stays of each dimension of each tensor; a dimension may belong to several groups.

    Args:
        groups: Those that are cut.
        kept: Of each of them the units that stay.
    """
    stay: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        flags = torch.zeros(group.units + 1, dtype=torch.bool)
        flags[kept[group.name].cpu()] = True
        flags[-1] = True  # elements of no unit have the index -1
        for slot in group.slots:
            own = flags[slot.units]
            known = stay.get((slot.tensor, slot.dim))
            stay[slot.tensor, slot.dim] = own if known is None else known & own
    found: dict[str, list[Selection]] = {}
    for (name, dim), keep in stay.items():
        if not bool(keep.all()):
            found.setdefault(name, []).append((dim, keep.nonzero()[:, 0]))
    return {name: tuple(rows) for name, rows in found.items()}


def selected(tensor: Tensor, selections: Sequence[Selection]) -> Tensor:
    """A copy of what stays of a tensor, in the same order of memory."""
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    for dim, index in selections:
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if is_last else tensor


def cut_(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    literals: Mapping[str, Mapping[str, int]] | None = None,
) -> Cut:
    """Cut units out of a model, in place.

    Args:
        model: Changed; parameters keep their identity and lose their gradients.
        groups: Those that are cut; the model has all of their units.
        kept: Of each of them the units that stay.
        literals: Name of a weight -> attribute of its module -> value after the cut (``literals``).
    """
    chosen = selections_of(groups, kept)
    cut = Cut(chosen)
    done: set[int] = set()
    for name, selections in chosen.items():
        for owner, leaf in _homes(model, name):
            tensor = getattr(owner, leaf)
            if id(tensor) not in done:
                _replace(owner, leaf, selected(tensor.detach(), selections), cut)
                done.add(id(getattr(owner, leaf)))
            _mend(owner, cut, (literals or {}).get(name, {}))
    return cut


def _homes(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds a tensor, with the name it has there: tied weights have several."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = getattr(owner, leaf)
    yield owner, leaf
    for module in model.modules():
        for own, value in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001
            if value is tensor and (module, own) != (owner, leaf):
                yield module, own


def _replace(owner: nn.Module, leaf: str, value: Tensor, cut: Cut) -> None:
    tensor = getattr(owner, leaf)
    if isinstance(tensor, nn.Parameter):
        old, gradient = tensor.data, tensor.grad

        def back() -> None:
            _set_data(tensor, old)
            tensor.grad = gradient

        _set_data(tensor, value)
        cut._undo.append(back)  # noqa: SLF001
        return
    owner._buffers[leaf] = value  # noqa: SLF001

    def put_back() -> None:
        owner._buffers[leaf] = tensor  # noqa: SLF001

    cut._undo.append(put_back)  # noqa: SLF001


def _set_data(parameter: nn.Parameter, value: Tensor) -> None:
    """Other data behind a parameter, of another shape.

    What takes its gradients knows the old shape, and lives on where a loss of the last step is still at
    hand. Torch makes a new one only where the type changes, so that it changes in between.
    """
    parameter.grad = None
    other = torch.float64 if value.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=value.device)
    parameter.data = value


def _mend(module: nn.Module, cut: Cut, literals: Mapping[str, int]) -> None:
    """What a module knows of its own sizes follows its tensors."""
    for name, value in _sizes(module, literals).items():
        old = getattr(module, name, None)
        if old is not None and old != value:
            setattr(module, name, value)
            cut._undo.append(lambda n=name, o=old: setattr(module, n, o))  # type: ignore[misc]  # noqa: SLF001


def _sizes(module: nn.Module, literals: Mapping[str, int]) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        some = weight if isinstance(weight, Tensor) else module.running_mean
        return {} if some is None else {"num_features": len(some)}
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(module, _ConvNd):
        return _conv_sizes(module, shape, literals.get("groups", module.groups))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    names = next((n for kind, n in _NAMES.items() if isinstance(module, kind)), ())
    if not names and len(shape) == 2 and hasattr(module, "nf"):  # transformers' linear of GPT-2
        names = ("nx", "nf")
    return dict(zip(names, shape, strict=False)) | dict(literals)


def _conv_sizes(module: _ConvNd, shape: tuple[int, ...], groups: int) -> dict[str, int]:
    first, second = shape[0], shape[1] * groups
    ends = (first, second) if module.transposed else (second, first)
    return {"in_channels": ends[0], "out_channels": ends[1], "groups": groups}


@contextlib.contextmanager
def zeroed(model: nn.Module, groups: Sequence[Group], kept: Kept) -> Iterator[None]:
    """The model with the units that do not stay at zero, inside; as it was, after."""
    old: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for group in groups:
            gone = torch.ones(group.units + 1, dtype=torch.bool)
            gone[kept[group.name].cpu()] = False
            gone[-1] = False
            for slot in group.slots:
                if slot.is_made:
                    tensor = model.get_parameter(slot.tensor)
                    old.append((tensor, tensor.detach().clone()))
                    index = gone[slot.units].nonzero()[:, 0].to(tensor.device)
                    tensor.index_fill_(slot.dim, index, 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for changed, value in reversed(old):
                changed.copy_(value)
