"""The size that a verdict states, of a file that holds the verdict."""

from collections.abc import Callable

import pytest

from tersor.api.judging import stated_size

FILES: dict[str, Callable[[int], int]] = {
    "longer by its digits": lambda stated: 27_700 + 3 * len(str(stated)),
    "a power of ten": lambda stated: 9_990 + 2 * len(str(stated)),
    "much longer once it is judged": lambda stated: 5_000 + 90 * (stated > 0),
    "never its own": lambda stated: stated // 7 % 5 + 1_000 + (stated == 1_000),
    "shorter": lambda stated: 4_000 - min(stated, 30),
}


@pytest.mark.parametrize("name", FILES)
def test_the_size_is_not_below_that_of_the_file_that_states_it(name: str) -> None:
    stated = stated_size(FILES[name])
    # Room for what another date adds when the file is written.
    assert 3 <= stated - FILES[name](stated) <= 40
