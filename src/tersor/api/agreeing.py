"""What all ranks of a run must have in common, and how one shows the others that it is at work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tersor._version import __version__
from tersor.core.jsonable import digest, dumps
from tersor.core.progress import Progress
from tersor.core.records import BackendInfo
from tersor.observe.ranks import RankGroup

_SHOWN = 12  # digits of a hash
ADVICE = (
    "every rank must make the same call: the same model and the same data in the same order (a fixed "
    "seed, no DistributedSampler: the samples are shared out here), and the same versions"
)


class Beating:
    """A progress of rank 0 that tells the ranks which wait for it that it is alive."""

    def __init__(self, progress: Progress, ranks: RankGroup) -> None:
        self._progress, self._ranks = progress, ranks

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins."""
        self._ranks.beat()
        self._progress.stage(name, total)

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""
        self._ranks.beat()
        self._progress.advance(steps)

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._ranks.beat()
        self._progress.note(text)

    def close(self) -> None:
        """The run is over."""
        self._progress.close()


def agree(
    ranks: RankGroup,
    options: Mapping[str, Any],
    infos: Sequence[BackendInfo],
    hashes: Callable[[], Mapping[str, str]],
) -> None:
    """Make sure that all ranks compress the same model in the same way.

    Args:
        ranks: Who must agree; one alone does.
        options: The caller's, by name.
        infos: What the backends can do on this rank's machine: offers depend on it.
        hashes: Of the model and the data, by name.

    Raises:
        RankError: On every rank; says which one differs in what.
    """
    if not ranks.is_shared:
        return
    facts = {
        "tersor": __version__,
        "torch": str(torch.__version__),
        "backends": ", ".join(f"{i.name} {i.version}" for i in infos),
        "formats of the backends": digest([*infos])[:_SHOWN],
        **{name: dumps(value) for name, value in options.items()},
        **{name: text[:_SHOWN] for name, text in hashes().items()},
    }
    ranks.agree(facts, "open", ADVICE)
