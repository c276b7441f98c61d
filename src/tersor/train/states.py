"""States of an optimizer follow the parameters that they belong to."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.train.cutting import Selection, selected


def cut_states_(
    optimizer: Optimizer,
    cuts: Mapping[nn.Parameter, Sequence[Selection]],
    shapes: Mapping[nn.Parameter, torch.Size],
) -> tuple[str, ...]:
    """Cut every state tensor of a parameter's old shape as the parameter was cut.

    A tensor of another shape that is no single number (rows and columns of factored moments) can't
    follow; that parameter's state begins anew. One that has the new shape already was loaded from a checkpoint
    of the small model, and stays.

    Args:
        optimizer: Its ``state`` is changed.
        cuts: Parameter -> what stays of each dimension that changed.
        shapes: Parameter -> its shape before.

    Returns:
        A note for each parameter whose state begins anew.
    """
    notes: list[str] = []
    for parameter, selections in cuts.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        fitting = (shapes[parameter], parameter.shape)
        alien = [n for n, v in state.items() if _is_alien(v, fitting)]
        if alien:
            optimizer.state.pop(parameter)
            notes.append(
                f"the optimizer's {', '.join(map(str, alien))} of a parameter {tuple(shapes[parameter])} "
                "can't be cut; its state begins anew"
            )
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == shapes[parameter]:
                state[name] = selected(value, selections)
    return tuple(notes)


def _is_alien(value: object, fitting: Sequence[torch.Size]) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and value.shape not in fitting
