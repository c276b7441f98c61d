"""Annotations of the package are checked while its tests run.

Only modules with shapes in their annotations pay for jaxtyping, which binds the arguments of every
call: with it everywhere the suite would take twice as long. beartype alone checks all others.
"""

from beartype import BeartypeConf
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

WITH_SHAPES = ("tersor.ops", "tersor.graph.axes.heads")
# Its hook checks functions inside of other decorators, such as Triton's; that of beartype outside.
_DECORATED = ("tersor.kernels",)
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
    install_import_hook([*WITH_SHAPES, *_DECORATED], _CHECKER)
