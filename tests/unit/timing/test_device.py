"""Calls of builds: those whose inputs lie on a device time themselves."""

from typing import Any

import numpy as np

from tersor.timing.device import SelfTimed, call_of

INPUTS = {"x": np.zeros(2)}


class Plain:
    """Runs where it is called."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def run(self, inputs: Any) -> Any:
        self.seen.append(inputs)
        return inputs


class Timed:
    """A call with a clock of its own."""

    def __call__(self) -> object:
        return None

    def timed_ms(self) -> float:
        return 2.0


class Resident(Plain):
    """Takes inputs once, for all calls."""

    is_resident = True

    def resident(self, inputs: Any) -> Timed:
        self.seen.append(inputs)
        return Timed()


def test_a_build_on_this_processor_is_called_with_its_inputs() -> None:
    build = Plain()
    call = call_of(build, INPUTS)
    assert not isinstance(call, SelfTimed)
    assert not build.seen
    assert call() is INPUTS
    assert build.seen == [INPUTS]


def test_inputs_go_to_a_device_once() -> None:
    build = Resident()
    call = call_of(build, INPUTS)
    assert isinstance(call, SelfTimed)
    assert [call.timed_ms() for _ in range(3)] == [2.0] * 3
    assert build.seen == [INPUTS]
