"""Two processes recover one graph: both end with the same tensors, as close as one process comes."""

import pytest

from tests.ranks import start_ranks, wait_for
from tests.unit.recover.rank_program import QUICK, recovered


@pytest.mark.slow
def test_two_ranks_train_one_set_of_tensors() -> None:
    ended = wait_for(start_ranks(2, "-m", "tests.unit.recover.rank_program"), 110)
    assert [e.code for e in ended] == [0, 0], [e.errors for e in ended]
    for first, second in zip(*(e.said for e in ended), strict=True):
        assert first == second  # tensors to the bit, steps, and every loss that decided
        assert first["is_kept"]
        assert first["after"] < 0.5 * first["before"]
    steps, seconds = ended[0].said
    made = [part["steps"] for part in steps["parts"] if part["part"] != "moments"]
    assert made == [QUICK.steps] * len(made)
    assert sum(part["steps"] for part in seconds["parts"]) > len(seconds["parts"])
    alone = recovered(QUICK)
    assert alone["tensors"] != steps["tensors"]  # other samples are drawn
    assert alone["before"] == steps["before"]
