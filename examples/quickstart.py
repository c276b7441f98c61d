"""Compress a small classifier for this processor: ``python examples/quickstart.py``.

Run from a clone of the repository: weights and images lie in ``tests/data``.
"""

import tersor
from tersor.cli.demo.models import resnet20

case = resnet20()
result = tersor.compress(
    case.model,
    case.data(),
    target=tersor.Target(drop_points=0.2),
    metric=case.metric,
    test_metric=case.test_metric,
)
print(result.verdict.status, f"{result.verdict.speedup:.2f}x the best uncompressed build")
result.save("resnet20.tersor")

runner = tersor.load("resnet20.tersor")
print(runner(case.test[0][:3]).argmax(1))
