"""Closures of an optimizer's step, of which some take one: what has to happen around a call of them."""

from collections.abc import Callable
from typing import Any

Closure = Callable[[], Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The closure among the arguments of a step, whose first one is the optimizer."""
    found: Closure | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return found


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure | None
) -> Arguments | None:
    """The arguments of a step with another closure; None where there is none: as they are."""
    if closure is None:
        return None
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def around(closure: Closure | None, before: Closure, after: Closure) -> Closure | None:
    """A closure with something in front of each call, and something behind it whatever comes."""
    if closure is None:
        return None

    def run() -> Any:
        before()
        try:
            return closure()
        finally:
            after()

    return run
