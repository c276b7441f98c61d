"""The loss that the search minimises: the caller's metric, or the agreement, on the search part."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tersor.api.session import Session, metric_of
from tersor.core.data import Metric
from tersor.core.errors import MetricError
from tersor.core.target import Target
from tersor.graph.contracts import Graph
from tersor.graph.geometry import output_error
from tersor.propose.propose import chunks
from tersor.verify.verify import agreement, by_shape

Vector = np.ndarray[Any, np.dtype[np.float64]]

_SHOWN = 80  # characters of what is no number
_FRACTION = 0.01  # a point of a metric that is a fraction
_REPEATS = 1e-3  # two calls on one model differ by less, of a point or of their value
_LEAST_BUDGET = 1e-6  # a budget of zero allows rounding only


def score(metric: Metric, predict: Callable[..., Any], name: str) -> float:
    """Call the caller's metric.

    Raises:
        MetricError: It raised, or returned something that is no finite number.
    """
    try:
        found = metric.function(predict)
    except Exception as error:
        raise MetricError(
            f"{name} raised {type(error).__name__}: {error}; wanted a function that takes predict "
            "(called like the model) and returns a number"
        ) from error
    value = _number(found)
    if value is None:
        raise MetricError(
            f"{name} returned {repr(found)[:_SHOWN]} ({type(found).__name__}); wanted one number, higher is better, such "
            "as a float or an array without dimensions"
        )
    if not math.isfinite(value):
        raise MetricError(f"{name} returned {value}; wanted a finite number, higher is better")
    return value


def _number(found: object) -> float | None:
    """What a metric gave as a number; None: it is none. Text that reads like one is a mistake."""
    if isinstance(found, str | bytes | bytearray):
        return None
    try:
        return float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def original_score(session: Session, name: str) -> float:
    """The caller's ``metric`` or ``test_metric`` of the original, called once a session.

    Raises:
        MetricError: It can't be called, or its value is no fraction although points are not given.
    """
    if name not in session.scores:
        metric = metric_of(getattr(session.settings, name))
        assert metric is not None
        original_predict = _with_arrays(session.as_given(session.captured.original))
        original = Watched(original_predict)
        found = score(metric, original, name)
        if metric.points == _FRACTION and not -1e-9 <= found <= 1 + 1e-9:
            raise MetricError(
                f"{name} returned {found:g}; wanted a fraction from 0 to 1, or "
                "tersor.Metric(function, points=...) that says what a point is"
            )
        if name == "metric":  # a test_metric is called once
            _check_repeats(metric, original_predict, found)
        session.scores[name] = found
        session.answers[name] = original.answers
    return session.scores[name]


def _check_repeats(metric: Metric, predict: Callable[..., Any], found: float) -> None:
    """A search compares many plans by small differences: they must not be the metric's own."""
    again = score(metric, predict, "metric")
    if abs(again - found) > _REPEATS * max(metric.points, abs(found)):
        raise MetricError(
            f"metric returned {found:.6g} and then {again:.6g} for the same model; wanted the same "
            "number for the same predictions: use all samples in a fixed order, or draw them with a "
            "seed that it sets itself"
        )


class Watched:
    """A predict that remembers the class of each sample that the metric asked for.

    Only where the first output is one row of logits a sample: the outputs of one picture's pixels
    or tokens are no independent answers.
    """

    def __init__(self, predict: Callable[..., Any]) -> None:
        self._predict = predict
        self.answers: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapped function."""
        found = self._predict(*args, **kwargs)
        leaves = [leaf for leaf in tree_flatten(found)[0] if isinstance(leaf, Tensor | np.ndarray)]
        first = torch.as_tensor(leaves[0]) if leaves else torch.zeros(0)
        if first.dim() == 2 and first.shape[1] > 1:
            self.answers.append(first.argmax(1))
        return found

    def error(self, others: Sequence[Tensor]) -> float:
        """Standard error of the difference of two shares of right answers; 0 where unknown.

        A sample on which both say the same adds nothing, any other at most 1: with a share d of
        those among n samples the variance of the difference is at most d / n.
        """
        if not others or [len(a) for a in self.answers] != [len(a) for a in others]:
            return 0.0
        differ = torch.cat(self.answers) != torch.cat(list(others))
        if not len(differ):  # it was called with no samples at all
            return 0.0
        return math.sqrt(float(differ.double().mean()) / len(differ))


def _with_arrays(original: Callable[..., Any]) -> Callable[..., Any]:
    """The original as runners are called: floats of any width, NumPy in and NumPy out."""

    def predict(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        given, named = tree_unflatten([_as_tensor(leaf) for leaf in leaves], spec)
        found = original(*given, **named)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return found
        return tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, Tensor) else leaf, found)

    return predict


def _as_tensor(leaf: Any) -> Any:
    tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
    is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.float() if is_float else tensor


@dataclass
class Quality:
    """Losses of graphs on the search part."""

    session: Session
    target: Target
    _batches: list[tuple[Tensor, ...]] = field(default_factory=list)
    _wanted: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    _marks: Vector | None = None

    @property
    def metric(self) -> Metric | None:
        """The caller's metric."""
        return metric_of(self.session.settings.metric)

    def original_score(self) -> float:
        """The metric of the original, computed once."""
        return original_score(self.session, "metric")

    def limit(self) -> float | None:
        """The largest loss that the target allows, in the units of ``loss``."""
        budgets = self._budgets()
        if not budgets:
            return None
        return 1.0 if len(budgets) > 1 else next(iter(budgets.values()))

    def _budgets(self) -> dict[str, float]:
        found = {}
        if self.target.drop_points is not None:
            found["drop_points"] = max(self.target.drop_points, _LEAST_BUDGET)
        if self.target.min_agreement is not None:
            found["min_agreement"] = max(1.0 - self.target.min_agreement, _LEAST_BUDGET)
        return found

    def loss(self, graph: Graph) -> float:
        """Loss of a graph: in points, in 1 - agreement, or the larger share of two budgets."""
        budgets = self._budgets()
        values = {name: self._value(graph, name) for name in budgets}
        if not budgets:
            return self._value(graph, "drop_points" if self.metric else "min_agreement")
        if len(budgets) == 1:
            return next(iter(values.values()))
        return max(values[name] / budgets[name] for name in budgets)

    @property
    def unit(self) -> tuple[str, float]:
        """What a loss is of, and how many of its units are all of that: losses of one quantity can be converted."""
        budgets = self._budgets()
        if self._is_scored and not budgets.keys() - {"drop_points"}:
            return "the metric", 100.0
        if self.metric is not None and len(budgets) > 1:
            return f"the larger share of {sorted(budgets.items())}", 1.0
        scales = {"drop_points": 100.0, "min_agreement": 1.0}
        if len(budgets) > 1:
            return "agreement", max(scales[name] / budgets[name] for name in budgets)
        return "agreement", scales[next(iter(budgets), "min_agreement")]

    def points(self, loss: float) -> float:
        """A loss in points of the metric or of agreement, no more than there are."""
        quantity, whole = self.unit
        if quantity == "agreement":
            most = 100.0 if self.session.kind == "logits" else 200.0  # of a cosine of -1
            return min(100.0 * loss / whole, most)
        if quantity == "the metric":
            assert self.metric is not None
            return min(loss, 100.0) if self.metric.points == _FRACTION else loss
        return loss * self._budgets()["drop_points"]

    def seen(self, graph: Graph) -> tuple[float, Vector | None]:
        """The loss of a graph, and what tells its noise beside another's; None where nothing does.

        That is the agreement of each sample, or its class where a metric asked for one.
        """
        self._marks = None
        return self.loss(graph), self._marks if len(self._budgets()) < 2 else None

    def noise(self, one: Vector, other: Vector) -> float:
        """Standard error of the difference of two losses, from what ``seen`` told beside them."""
        n = len(one)
        if n < 2:
            return 0.0
        if self._is_scored:
            assert self.metric is not None
            # As of ``Watched.error``: only samples of which both say another class can differ.
            return math.sqrt(float((one != other).mean()) / n) / self.metric.points
        scale = 100.0 if "drop_points" in self._budgets() else 1.0
        return scale * float((one - other).std(ddof=1)) / math.sqrt(n)

    @property
    def has_errors(self) -> bool:
        """Whether losses are means of what each sample says, with one standard error on top."""
        return not self._is_scored and self.session.kind != "logits"

    @property
    def _is_scored(self) -> bool:
        """Whether the loss is the caller's metric's."""
        return self.metric is not None and "min_agreement" not in self._budgets()

    def _value(self, graph: Graph, budget: str) -> float:
        if budget == "drop_points" and self.metric is not None:
            predict = Watched(self.session.as_given(self.session.reference(graph)))
            lost = self.original_score() - score(self.metric, predict, "metric")
            if predict.answers:
                self._marks = torch.cat(predict.answers).double().numpy()
            if self.session.kind == "logits" and self.metric.points == _FRACTION:
                lost += predict.error(self.session.answers["metric"])
            return lost / self.metric.points
        agreements = agreement(*self._outputs(graph), self.session.kind)
        self._marks = agreements.double().numpy()
        lost = float(1.0 - agreements.mean())
        if self.session.kind != "logits" and len(agreements) > 1:
            lost += float(agreements.std()) / math.sqrt(len(agreements))  # one standard error
        return 100.0 * lost if budget == "drop_points" else lost

    def error(self, graph: Graph) -> float:
        """Change of the outputs in their own geometry: finer than a share of equal answers."""
        pairs = by_shape(*self._outputs(graph))
        errors = [output_error(*pair, self.session.kind) for pair in pairs]
        return float(torch.cat(errors).mean())

    def batches(self) -> list[tuple[Tensor, ...]]:
        """Flat inputs of the search part."""
        if not self._batches:
            part = self.session.parts["search"]
            self._batches += chunks(self.session.graph, part.tensors, part.others)
        return self._batches

    def wanted(self, batch: int) -> tuple[Tensor, ...]:
        """Outputs of the original on one of the batches."""
        if batch not in self._wanted:
            self._wanted[batch] = self.session.graph.run(self.batches()[batch])
        return self._wanted[batch]

    def _outputs(self, graph: Graph) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """Outputs of a graph and of the original on the search part, by batch."""
        batches = self.batches()
        wanted = [self.wanted(i) for i in range(len(batches))]
        return [graph.run(flat) for flat in batches], wanted
