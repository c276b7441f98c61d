"""Annotations of the package are checked while its tests run.

jaxtyping binds the arguments of every call, which more than doubles the time of code that calls
small functions: only modules with shapes in their annotations have it, and those whose annotations
name what is imported for type checkers alone or whose functions have decorators of other packages,
which the hook of beartype does not take. beartype alone checks all others.
"""

from beartype import BeartypeConf
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

WITH_SHAPES = ("tersor.ops", "tersor.graph.axes.heads")
_NOT_BY_BEARTYPE = ("tersor.api", "tersor.backends", "tersor.cli", "tersor.kernels", "tersor.train")
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_random=False))"


def check_annotations() -> None:
    """To be called before anything of the package is imported."""
    conf = BeartypeConf(
        is_pep484_tower=True,
        is_random=False,
        claw_is_pep526=False,
        warning_cls_on_decorator_exception=None,
    )
    beartype_package("tersor", conf=conf)
    install_import_hook([*WITH_SHAPES, *_NOT_BY_BEARTYPE], _CHECKER)
