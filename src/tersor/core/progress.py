"""How a long run tells its caller where it is."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives stages and steps; implementations draw them or drop them."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; ``total`` steps are expected, or an unknown number."""
        ...

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage are done."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class Silent:
    """Drops everything."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Drop it."""

    def advance(self, steps: int = 1) -> None:
        """Drop it."""

    def note(self, text: str) -> None:
        """Drop it."""

    def close(self) -> None:
        """Drop it."""


class Printed:
    """One line a stage, on standard error."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Print the stage's name."""
        import sys

        steps = f" ({total})" if total else ""
        print(f"tersor: {name}{steps}", file=sys.stderr, flush=True)  # noqa: T201

    def advance(self, steps: int = 1) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Print a line."""
        import sys

        print(f"tersor:   {text}", file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        """Say nothing."""
