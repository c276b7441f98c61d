"""All cases: at least one of every rule."""

from tests.unit.graph.axes import (
    cases_elementwise,
    cases_experts,
    cases_products,
    cases_shapes,
    cases_windows,
)
from tests.unit.graph.axes.micro import Case

CASES: list[Case] = [
    *cases_elementwise.CASES,
    *cases_products.CASES,
    *cases_shapes.CASES,
    *cases_windows.CASES,
    *cases_experts.CASES,
]
