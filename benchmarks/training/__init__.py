"""Small out of training, against the ways people get there: ``python -m benchmarks.training``."""
