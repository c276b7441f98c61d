"""The forms of a low-rank layer with one rank: what their two factors are, and which ranks pay at all.

``output``: the whole kernel to few channels, then 1 x 1 (a linear layer's only form). ``input``: 1 x 1
to few channels, then the kernel. ``height``, ``width``: a kernel's rows, then its columns, and the
other way round.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Literal, get_args

from tersor.core.errors import ConfigError
from tersor.ops.factor_costs import (
    Cost,
    LayerSizes,
    height_cost,
    input_cost,
    largest_rank,
    output_cost,
    width_cost,
)

Form = Literal["output", "input", "height", "width"]
_COSTS: Mapping[Form, Callable[[LayerSizes, int], Cost]] = {
    "output": output_cost,
    "input": input_cost,
    "height": height_cost,
    "width": width_cost,
}
# Below so many channels a factor is all overhead on every device that was measured.
LEAST_RANK = 8


def forms_of(kernel: tuple[int, ...]) -> tuple[Form, ...]:
    """The forms that a kernel has; a linear layer's is empty."""
    if prod(kernel) == 1:
        return ("output",)
    return ("output", "height", "width") if len(kernel) == 2 else ("output", "input")


def as_form(name: str) -> Form:
    """A form by its name.

    Raises:
        ConfigError: There is no such form.
    """
    for form in get_args(Form):
        if form == name:
            return form  # type: ignore[no-any-return]
    raise ConfigError(f"form of a low-rank layer: found {name!r}, wanted one of {get_args(Form)}")


def rank_limit(layer: LayerSizes, form: Form, share: float = 1.0) -> int:
    """Largest rank below a share of the dense layer's weights and operations, and of full rank."""
    return min(largest_rank(layer, _COSTS[form], share), full_rank(layer, form))


def full_rank(layer: LayerSizes, form: Form) -> int:
    """The rank at which a form of an ungrouped layer loses nothing, or can't be higher."""
    (_, inputs), _ = factor_shapes(layer, form, 1)
    rest = layer.inputs * prod(layer.kernel) // inputs  # offsets that the second factor covers
    return min(inputs, layer.outputs * rest)


def factor_shapes(
    layer: LayerSizes, form: Form, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Outputs and unfolded inputs of both factors of an ungrouped layer."""
    size = prod(layer.kernel)
    first = {"output": size, "input": 1}.get(form)
    if first is None:
        first = layer.kernel[0 if form == "height" else 1]
    return (rank, layer.inputs * first), (layer.outputs, rank * (size // first))


def offered_ranks(limit: int, step: int, most: int) -> tuple[int, ...]:
    """Ranks worth a price: whole tiles up to a limit, about evenly spread, the largest first.

    Args:
        limit: Largest rank that pays; none are offered below ``LEAST_RANK``.
        step: Channels in a tile of the device; halved where fewer than two tiles fit.
        most: Ranks at most, >= 1.
    """
    while step > LEAST_RANK and limit < 2 * step:
        step = (step + 1) // 2
    last = limit // step
    if last < 1 or step > limit or limit < LEAST_RANK:
        return ()
    places = {max(1, round(last * i / most)) for i in range(1, most + 1)}
    return tuple(sorted((step * place for place in places), reverse=True))
