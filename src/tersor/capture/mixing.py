"""Whether a sample's output is the sample's own, or depends on the batch that it came in.

All that is measured and built later takes samples one by one or in batches of any size, so a model
that mixes them has no one answer for a sample: comparisons at one batch size can't see it.

A sample beside another one is compared with the same sample, at the same place, beside a copy of itself.
Both calls run the same kernels in the same order, so that rounding is the same, too: a model that makes
much of it, as by rounding to codes of its own or by choosing experts, differs in nothing where it is sound.
At another place or alone a sample runs through other kernels, and only a large difference tells.
"""

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.core.errors import ParityError
from tersor.core.records import TensorSpec

Flat = Sequence[Tensor]
Run = Callable[[Flat], list[Tensor]]

# What is divided by the number of samples, or by its root, differs by 1 - 1 / sqrt(2) = 0.29 between one and two
# of them. A sound model with few bits of its own moves by some steps, for those values that lay between two.
_LARGE = 0.25
_TINY = 1e-12
_REFUSALS = (
    *(TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError),
    AssertionError,  # guards of an exported program that takes no batch of one
)
_WAY_OUT = (
    "compute each sample from itself alone, with statistics over other dimensions or stored ones (a "
    "batch norm with track_running_stats=True) and batch_first=True in attention and recurrent layers, or "
    "leave that part outside of the model"
)


@dataclass(frozen=True, slots=True)
class _Calls:
    """Outputs of two samples together, of each beside a copy of itself, and of the second one alone."""

    pair: list[Tensor]
    twins: tuple[list[Tensor], list[Tensor]]
    alone: list[Tensor] | None  # None: the model takes no batch of one


def check_mixing(
    model: nn.Module,
    run: Run,
    groups: Iterable[Flat],
    specs: Sequence[TensorSpec],
    limit: float,
) -> None:
    """Refuse a model that mixes the samples of a batch.

    Args:
        model: Named in the message.
        run: Outputs of the model for flat inputs, in the order of ``specs``.
        groups: Flat samples by shape. Two that differ are taken; of one sample alone, only what its
            place in the batch and the batch's size change is seen.
        specs: Of the outputs; those that are no rows of samples are left out.
        limit: Of a difference, relative to the output's scale.

    Raises:
        ParityError: A sample's output changes with the samples beside it, its place among them or
            their number.
    """
    calls = _calls(model, run, _two(groups))
    if calls is None:
        return
    for index, spec in enumerate(specs):
        rows = calls.pair[index]
        if _is_rows(spec, rows):
            found = _changed_by(calls, index, limit)
            if found is not None:
                raise ParityError(_said(model, f"output {spec.name!r} of one sample {found}"))


def _two(groups: Iterable[Flat]) -> tuple[Tensor, ...]:
    """Two samples of one shape that differ; the first one twice where no shape has such."""
    repeated: tuple[Tensor, ...] | None = None
    for flat in groups:
        rows = range(1, int(flat[0].shape[0]))
        other = next((i for i in rows if not all(torch.equal(t[i], t[0]) for t in flat)), 0)
        if other:
            return tuple(t[[0, other]] for t in flat)
        repeated = repeated or tuple(t[[0, 0]] for t in flat)
    assert repeated is not None  # samples have one shape at least
    return repeated


def _calls(model: nn.Module, run: Run, two: Flat) -> _Calls | None:
    """The outputs; None where the model refuses these samples together for another reason."""
    try:
        alone = run([t[1:] for t in two])
    except _REFUSALS as error:
        if _is_of_batch_norm(error):
            raise ParityError(
                _said(model, f"one sample alone can't be computed ({error})")
            ) from error
        alone = None
    try:
        pair = run(two)
        first, second = (run([t[[row, row]] for t in two]) for row in (0, 1))
    except _REFUSALS:
        return None
    return _Calls(pair, (first, second), alone)


def _is_of_batch_norm(error: BaseException) -> bool:
    """Whether torch's own check of a batch norm raised: it computes statistics from the batch.

    The text alone won't do: a group norm of one value says the same, and mixes nothing.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any(f.name == "batch_norm" and f.filename == nn.functional.__file__ for f in frames)


def _is_rows(spec: TensorSpec, output: Tensor) -> bool:
    """One row a sample; what else a model returns is judged elsewhere."""
    batches = [dim for dim, size in enumerate(spec.shape) if size is None]
    return batches == [0] and len(output) == 2 and output.numel() > 0


def _changed_by(calls: _Calls, index: int, limit: float) -> str | None:
    """What changes an output of a sample beside the sample itself; None where nothing does."""
    pair, twins = calls.pair[index], [outputs[index] for outputs in calls.twins]
    scale = max(float(pair.double().nan_to_num(0.0, 0.0, 0.0).abs().max()), _TINY)
    seen = [(_gap(twins[row][row], pair[row], scale), limit, "the other samples") for row in (0, 1)]
    if pair.is_floating_point():  # of whole numbers rounding may make others, as of tied classes
        seen.append((_gap(twins[1][0], twins[1][1], scale), _LARGE, "its place among the samples"))
        # Another shape comes of squeeze() and the like, and is no sign of mixing.
        if calls.alone is not None and calls.alone[index].shape == pair[1:].shape:
            size = _gap(calls.alone[index][0], twins[1][1], scale)
            seen.append((size, _LARGE, "the number of samples"))
    for found, wanted, what in seen:
        if (
            not found <= wanted
        ):  # NaN, too: the pair's own outputs are finite, as parity was asked of such
            return (
                f"changes by {found:.2e} of the output's scale with {what} in its batch, wanted at most "
                f"{wanted:g}"
            )
    return None


def _gap(found: Tensor, wanted: Tensor, scale: float) -> float:
    """Largest difference; infinite where one is not finite and the other is something else."""
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    difference = (found.double() - wanted.double()).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) / scale


def _said(model: nn.Module, found: str) -> str:
    names = [
        f"{name or type(module).__name__!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - the one base of all three
        and module.running_mean is None
    ]
    norms = f" (batch norms without running statistics: {', '.join(names[:3])})" if names else ""
    return (
        f"{type(model).__name__} mixes the samples of a batch{norms}: {found}; what runs over "
        f"dimension 0 does that (a mean, softmax, norm, attention or recurrence): {_WAY_OUT}"
    )
