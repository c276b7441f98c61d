"""One small function for each op: how the labels of its inputs become those of its outputs."""

from tersor.graph.axes.rules import (
    attention,
    elementwise,
    indexing,
    joining,
    norms,
    products,
    reductions,
    shapes,
    windows,
)

__all__ = [
    "attention",
    "elementwise",
    "indexing",
    "joining",
    "norms",
    "products",
    "reductions",
    "shapes",
    "windows",
]
