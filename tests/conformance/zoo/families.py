from collections.abc import Iterator
from tests.conformance.zoo.entry import ZooModel
def entries() -> Iterator[ZooModel]:
    return iter(())
