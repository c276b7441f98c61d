"""One method on all layers of a model: its rows, where they are not recorded yet."""

from dataclasses import dataclass

from benchmarks.solvers.layers import Solve, Subject
from benchmarks.solvers.rows import Recorder, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting of a table, and the model that methods are tried on."""

    table: str
    model: str
    name: str
    subject: Subject
    recorder: Recorder

    def layers(self, method: str, solve: Solve, source: str) -> None:
        """Each weight on the original's own inputs."""
        if self._has(method, "layer"):
            return
        weights = self.subject.solved(solve)
        self.recorder.add(
            Row(
                table=self.table,
                model=self.model,
                setting=self.name,
                method=method,
                layers=self.subject.errors(weights),
                quality=self.subject.judge(self.subject.stitched(weights)),
                source=source,
            )
        )

    def sequential(self, method: str, solve: Solve, source: str) -> None:
        """Each weight behind the compressed prefix."""
        if self._has(method, "sequential"):
            return
        quality = self.subject.judge(self.subject.sequential(solve))
        place = {"table": self.table, "model": self.model, "setting": self.name}
        self.recorder.add(
            Row(**place, method=method, mode="sequential", quality=quality, source=source)
        )

    def _has(self, method: str, mode: str) -> bool:
        return self.recorder.has(self.table, self.model, self.name, method, mode)
