"""Changes of an assignment, also of counts that no method offered."""

import pytest
import torch

from tersor.api.proposing import Offers
from tersor.core.records import Site
from tersor.graph.contracts import SiteChange

SITE = Site(name="width:w", kind="width", ops=("op",), units=8, unit_kind="channels")
KEPT = {6: [0, 1, 3, 4, 6, 7], 2: [3, 6]}
CHANGES = {
    ("width:w", 8): SiteChange(site=SITE, level=8),
    **{
        ("width:w", n): SiteChange(site=SITE, level=n, kept=torch.tensor(k))
        for n, k in KEPT.items()
    },
}


@pytest.mark.parametrize(
    ("count", "wanted"), [(6, KEPT[6]), (2, KEPT[2]), (4, [0, 1, 3, 4]), (7, list(range(7)))]
)
def test_a_count_between_takes_units_of_the_next_larger_one(count: int, wanted: list[int]) -> None:
    (change,) = Offers(candidates=(), changes=CHANGES).chosen({"width:w": count}).widths
    assert (change.level, change.site) == (count, SITE)
    assert change.kept is not None
    assert change.kept.tolist() == wanted


def test_all_units_are_no_change() -> None:
    assert Offers(candidates=(), changes=CHANGES).chosen({"width:w": 8}).widths == ()
