"""Models whose parameters lie in rows over several processes (``torch.distributed.fsdp.fully_shard``).

Scores, masks and latents are those of a process's own rows; sums over units are added up over the
processes, so that all see the same. Rows can't be cut in place: who holds which changes with their
number. The model is gathered on every process, cut there, and sharded anew by the caller's own
function; the optimizer's groups get the new parameters, and their states follow, in rows again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import ConfigError
from tersor.train.cutting import Selection, selected

_PLAIN = (Tensor, nn.Parameter)
Shard = Callable[[nn.Module], Any]
_MARKS = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_sharded(value: Tensor | nn.Module) -> bool:
    """Whether a tensor, or any parameter of a module, lies over several processes."""
    if isinstance(value, nn.Module):
        return any(is_sharded(p) for p in value.parameters())
    return getattr(value, "placements", None) is not None


def check_sharded(model: nn.Module, shard: Shard | None) -> None:
    """Refuse what can't be gathered and sharded again.

    Raises:
        ConfigError: No function that shards, or parameters that lie in another way than in rows.
    """
    if not is_sharded(model):
        if shard is not None:
            raise ConfigError(
                "attach: found shard= and a model that is not sharded; shard it first, or leave shard= out"
            )
        return
    if shard is None:
        raise ConfigError(
            f"attach: {_first(model)} is sharded over processes (FSDP2), and a smaller model has to be "
            "sharded anew; pass shard=fn, where fn(model) calls fully_shard on a plain model as you did, or "
            "attach to the plain model under DistributedDataParallel"
        )
    for name, parameter in model.named_parameters():
        places: Any = getattr(parameter, "placements", ())
        if len(places) != 1 or not places[0].is_shard(0):
            raise ConfigError(
                f"attach: {name} lies as {tuple(places) or 'one whole tensor'}, wanted rows over one mesh of "
                "processes, as fully_shard(module, mesh=...) makes them by default for every parameter"
            )


def _first(model: nn.Module) -> str:
    return next(n for n, p in model.named_parameters() if is_sharded(p))


def local(tensor: Tensor) -> Tensor:
    """This process's rows, sharing memory; of a tensor that is whole its data."""
    # Looking for what a plain tensor does not have costs more than the copies that its step makes.
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor.data
    found: Any = tensor.detach()
    rows: Tensor = found.to_local()
    return rows


def rows_of(tensor: Tensor) -> slice:
    """Which rows this process holds."""
    if not is_sharded(tensor):
        return slice(None)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    # As torch.chunk: the last processes may hold fewer rows, or none.
    each = -(-len(tensor) // mesh.size())
    return slice(each * mesh.get_local_rank(), each * (mesh.get_local_rank() + 1))


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every process, which must all ask for them."""
    found: Any = tensor.detach()
    rows: Tensor = found.full_tensor() if is_sharded(tensor) else found
    return rows


def joined(rows: Tensor, like: Tensor) -> Tensor:
    """All rows of something that lies like a parameter; every process must ask."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    places: Any = like.placements  # type: ignore[attr-defined]
    made = DTensor.from_local(rows, mesh, places, shape=like.shape, stride=like.stride())
    found: Tensor = made.full_tensor()
    return found


def over_shards(
    sums: Mapping[str, Tensor], counts: Mapping[str, int], parameters: Iterable[nn.Parameter]
) -> dict[str, Tensor]:
    """Sums over a process's own rows as sums over all rows.

    Args:
        sums: Group -> one number a unit.
        counts: Group -> units; a group that a process has no rows of counts as zeros.
        parameters: That they are of: all in rows, or none.
    """
    first: Any = next((p for p in parameters if is_sharded(p)), None)
    if first is None:
        return dict(sums)
    device = first.device
    names = sorted(counts)
    flat = torch.cat([sums.get(n, torch.zeros(counts[n], device=device)) for n in names])
    torch.distributed.all_reduce(flat, group=first.device_mesh.get_group())
    return dict(zip(names, flat.split([counts[n] for n in names]), strict=True))


def largest(value: float, model: nn.Module) -> float:
    """The largest number of all processes that share a model."""
    first: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if first is None:
        return value
    found = torch.tensor(value, device=first.device)
    group = first.device_mesh.get_group()
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return float(found)


def gathered(model: nn.Module) -> nn.Module:
    """A plain copy with whole parameters, on every process, which must all ask for it.

    The copy shares no tensor with the model, and has none of the hooks that gather and scatter.
    """
    known: dict[int, Any] = {}

    def tensor_of(old: Tensor | None) -> Any:
        if old is None or id(old) in known:
            return None if old is None else known[id(old)]
        value = whole(old).clone()
        is_parameter = isinstance(old, nn.Parameter)
        known[id(old)] = nn.Parameter(value, old.requires_grad) if is_parameter else value
        return known[id(old)]

    def copy_of(old: nn.Module | None) -> Any:
        if old is None or id(old) in known:
            return None if old is None else known[id(old)]
        kind: Any = _plain_type(type(old))
        new = known[id(old)] = kind.__new__(kind)
        own = {n: v for n, v in vars(old).items() if not n.startswith(_MARKS)}
        own = {n: _own_hooks(v) if "hooks" in n else v for n, v in own.items()}
        new.__dict__.update(own)
        new.__dict__["_parameters"] = {n: tensor_of(p) for n, p in old._parameters.items()}  # noqa: SLF001
        new.__dict__["_buffers"] = {n: tensor_of(b) for n, b in old._buffers.items()}  # noqa: SLF001
        new.__dict__["_modules"] = {n: copy_of(m) for n, m in old._modules.items()}  # noqa: SLF001
        return new

    found: nn.Module = copy_of(model)
    return found


def _plain_type(kind: type) -> type:
    """The class that ``fully_shard`` has put its own in front of."""
    names = [k.__name__ for k in kind.__mro__]
    return kind.__mro__[names.index("FSDPModule") + 1] if "FSDPModule" in names else kind


def _own_hooks(hooks: Any) -> Any:
    """Those of a module that are not the sharding's; a copy."""
    if not isinstance(hooks, dict):
        return hooks
    kept = {n: h for n, h in hooks.items() if not _is_of_sharding(h)}
    return type(hooks)(kept)


def _is_of_sharding(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith("torch.distributed")


def follow_(
    optimizer: Optimizer,
    old: nn.Module,
    new: nn.Module,
    selections: Mapping[str, Sequence[Selection]],
) -> tuple[str, ...]:
    """Give an optimizer the parameters of a model that was cut and sharded anew, and their states.

    Args:
        optimizer: Its groups and states are changed; the groups stay the same objects.
        old: The model before, sharded.
        new: After, with the same names.
        selections: Name -> what stays of each dimension that changed.

    Returns:
        A note for each parameter whose state begins anew.
    """
    before, after = (dict(m.named_parameters()) for m in (old, new))
    twins = {id(p): after[n] for n, p in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [twins.get(id(p), p) for p in group["params"]]
    notes: list[str] = []
    for name, parameter in before.items():
        state = optimizer.state.pop(parameter, None)
        if not state:
            continue
        shape, chosen = parameter.shape, selections.get(name, ())
        if chosen and any(_is_alien(v, shape) for v in state.values()):
            notes.append(f"the optimizer's state of {name} can't be cut; it begins anew")
            continue
        optimizer.state[after[name]] = {
            key: _like(selected(whole(value), chosen), after[name])
            if isinstance(value, Tensor) and value.shape == shape and value.dim()
            else value
            for key, value in state.items()
        }
    return tuple(notes)


def _is_alien(value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and value.shape != shape


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole tensor in rows as a parameter lies."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor

    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    places: Any = parameter.placements  # type: ignore[attr-defined]
    rows = value[rows_of(parameter)].contiguous()
    return DTensor.from_local(rows, mesh, places, shape=value.shape, stride=value.stride())
