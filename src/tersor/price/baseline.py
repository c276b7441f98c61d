"""The best uncompressed build: what every speed is compared with.

All builds run interleaved, first briefly, then the best few again with more rounds. Only builds of
one run are compared with each other: sessions differ by 10 % (FINDINGS 1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tersor.core.errors import BackendError
from tersor.core.records import BackendInfo, BaselineRow, BuildChoice, FloatChoice, Timing

Call = Callable[[], object]
Meter = Callable[[Mapping[str, Call]], Mapping[str, Timing]]  # measures interleaved

FINALISTS = 3
EAGER = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A build that could not be made, and why."""

    choice: BuildChoice
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """Uncompressed builds by latency, the model as given first if it was measured.

    Attributes:
        best: Index of the best build into ``rows``; never the eager row.
        calls: The executable of each finalist by name, to be the reference of later runs.
    """

    rows: tuple[BaselineRow, ...]
    best: int
    dropped: tuple[Dropped, ...]
    calls: Mapping[str, Call]

    @property
    def reference(self) -> Call:
        """The best build itself."""
        return self.calls[self.rows[self.best].name]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineTools:
    """What the comparison calls.

    Args:
        build: Makes the uncompressed build of a choice; raises BackendError where it can't be.
        quick, careful: Measure callables interleaved; few rounds, more rounds.
        size_bytes: Bytes of a build (of the model as given for None).
        eager: The model as given, or None to leave it out.
    """

    build: Callable[[BuildChoice], Call]
    quick: Meter
    careful: Meter
    size_bytes: Callable[[BuildChoice | None], int]
    eager: Call | None = None


def thread_settings(cores: int) -> tuple[int, ...]:
    """One, half of the cores and all of them, each once."""
    return tuple(sorted({1, max(1, cores // 2), max(1, cores)}))


def baseline_choices(info: BackendInfo, *, cores: int, batch: int) -> tuple[BuildChoice, ...]:
    """Every way to build floats that a backend offers, with every thread setting.

    Where it offers none, every precision with its first option set, which stands for all: the
    others say how int8 is lowered.
    """
    options = info.choices[0] if info.choices else {}
    floats = info.floats or tuple(
        FloatChoice(precision=precision, options=options) for precision in info.precisions
    )
    threads = thread_settings(cores) if info.device == "cpu" else (1,)
    return tuple(
        BuildChoice(
            backend=info.name,
            device=info.device,
            precision=way.precision,
            threads=n,
            batch=batch,
            options=way.options,
        )
        for way in floats
        for n in threads
    )


def measure_baselines(choices: Sequence[BuildChoice], tools: BaselineTools) -> Baselines:
    """Build and measure every choice; the best has the least median.

    Builds whose 95 % interval reaches that of the fastest are equal to it: the one with the
    fewest threads wins, then the least median.

    Raises:
        BackendError: Not one could be built.
    """
    by_name = {choice.describe(): choice for choice in choices}
    calls, dropped = _build_all(by_name, tools.build)
    if not calls:
        reasons = "; ".join(f"{d.choice.describe()}: {d.reason}" for d in dropped)
        raise BackendError(
            f"found no uncompressed build among {len(choices)} choices, wanted at least one "
            f"({reasons or 'there are no choices'}); see what tersor doctor says"
        )
    eager = {} if tools.eager is None else {EAGER: tools.eager}
    timings = dict(tools.quick({**eager, **calls}))
    finalists = sorted(calls, key=lambda name: (timings[name].median_ms, name))[:FINALISTS]
    careful = tools.careful({**eager, **{name: calls[name] for name in finalists}})
    timings.update(careful)
    best = _best({name: careful[name] for name in finalists}, by_name)
    order = [*eager, *sorted(calls, key=lambda name: (timings[name].median_ms, name))]
    rows = tuple(
        BaselineRow(
            name=name,
            choice=by_name.get(name),
            timing=timings[name],
            size_bytes=tools.size_bytes(by_name.get(name)),
        )
        for name in order
    )
    return Baselines(
        rows=rows,
        best=order.index(best),
        dropped=dropped,
        calls={name: calls[name] for name in finalists},
    )


def _build_all(
    choices: Mapping[str, BuildChoice], build: Callable[[BuildChoice], Call]
) -> tuple[dict[str, Call], tuple[Dropped, ...]]:
    calls: dict[str, Call] = {}
    dropped: list[Dropped] = []
    for name, choice in choices.items():
        try:
            calls[name] = build(choice)
        except BackendError as error:
            dropped.append(Dropped(choice=choice, reason=str(error)))
    return calls, tuple(dropped)


def _best(timings: Mapping[str, Timing], choices: Mapping[str, BuildChoice]) -> str:
    fastest = min(timings.values(), key=lambda t: t.median_ms)
    equal = [name for name, t in timings.items() if t.low_ms <= fastest.high_ms]
    return min(equal, key=lambda name: (choices[name].threads, timings[name].median_ms, name))
