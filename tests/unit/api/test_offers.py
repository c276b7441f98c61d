"""Changes of an assignment, also of counts that no method offered."""

import pytest
import torch

from tersor.api.proposing import Offers
from tersor.core.records import Candidate, Level, Site
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


def test_some_methods_offers_and_what_leaves_a_site_alone() -> None:
    def candidate(site: str, level: Level, method: str) -> Candidate:
        return Candidate(site=site, level=level, method=method, size_bytes=1)

    rows = (
        candidate("op", "f32", "as given"), candidate("op", "int8", "quantize"),
        candidate("op", "lut4_weight", "codebook"), candidate("width:w", 8, "prune"),
        candidate("width:w", 6, "prune"),
    )  # fmt: skip
    offers = Offers(candidates=rows, changes=CHANGES)
    assert offers.only(("quantize",)).candidates == (rows[0], rows[1], rows[3])
    assert offers.only(("codebook", "prune")).candidates == (rows[0], *rows[2:])
    assert offers.only(("codebook", "prune")).changes is CHANGES
