"""What tells the builds apart that prices find again."""

from dataclasses import replace

import torch

from tersor.api.memory import form
from tersor.core.records import Site
from tersor.graph.contracts import Quantizer, SiteChange

SITE = Site(name="add:sum", kind="format", ops=("sum",), op_kind="add", tensor="x")
GRID = Quantizer(step=0.1, low=0, high=255)


def test_operands_of_an_addition_tell_builds_apart_but_their_steps_do_not() -> None:
    plain = SiteChange(site=SITE, level="int8", operands={"x": GRID})

    def other(**fields: object) -> SiteChange:
        return replace(plain, operands={"x": replace(GRID, **fields)})  # type: ignore[arg-type]

    assert form(other(step=0.3)) == form(plain)
    different = [
        other(low=-128, high=127),
        other(inverse_scale=torch.ones(4)),
        other(shift=0.5),
        replace(plain, operands={"x": GRID, "y": GRID}),
        replace(plain, operands={}),
    ]
    assert all(form(change) != form(plain) for change in different)
