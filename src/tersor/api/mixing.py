"""Plans by some of the methods beside that by all of them, by their final weights.

The program adds up errors of single changes, and looks see weights behind cuts rounded to nearest: both say little
between a plan with cuts and one without. Where only the size is asked for, nothing but the change of the outputs
decides, so that the candidates are carried out and compared.
"""

from collections import Counter
from dataclasses import replace

from tersor.api.choosing import Scope, limits_for
from tersor.api.final import Made
from tersor.api.settling import Settling, seen


def settle(settling: Settling) -> Made:
    """The final graph; for a size alone that which changes the outputs least, of all methods and of some of them.

    ``settling.choice`` is that of the graph afterwards.
    """
    made, best = settling.made(), settling
    mixes = _mixes(settling)
    if not mixes:
        return made
    session, quality = settling.session, settling.quality
    own = seen(quality, made)
    for mix in mixes:
        session.progress.note(f"the best plan by {', '.join(mix)} alone is carried out as well")
        rival = replace(settling, scope=Scope(methods=mix))
        rival.choice = rival.chosen()
        if not _is_small(rival):
            continue
        tried = rival.made()
        if not _is_small(rival) or rival.bytes_over(tried) > 0:
            continue
        its = seen(quality, tried)
        is_better = its.is_nearer(own, quality)
        session.progress.note(
            f"it is {'nearer' if is_better else 'not nearer'}: loss {its.loss:.4g}, error {its.error:.3g}, "
            f"before {own.loss:.4g}, {own.error:.3g}"
        )
        if is_better:
            made, best, own = tried, rival, its
    if best is not settling:  # what was seen of other plans stays known
        known = [e.assignment for e in best.choice.evaluations]
        more = (e for e in settling.choice.evaluations if e.assignment not in known)
        evaluations = (*best.choice.evaluations, *more)
        settling.choice = replace(best.choice, evaluations=evaluations)
    return made


def _mixes(settling: Settling) -> list[tuple[str, ...]]:
    """Methods of plans that may beat one by all of them: none that cut, and that of most sites alone.

    No mix where anything but a size is asked for, or weights are trained afterwards, which takes minutes a plan.
    """
    session = settling.session
    limits = limits_for(
        settling.quality.target, settling.prices, settling.quality, session.original_bytes
    )
    is_size_alone = (
        limits.max_bytes is not None and limits.max_ms is None and limits.max_loss is None
    )
    if not is_size_alone or not _is_small(settling) or session.settings.recover is not None:
        return []
    plan = settling.choice.plan
    cuts = {m for s, m in plan.methods.items() if isinstance(plan.assignment[s], int)}
    ranked = [m for m, _ in Counter(plan.methods.values()).most_common()]
    found = [tuple(sorted(session.methods.keys() - cuts))] if cuts else []
    if len(ranked) > 1:
        found += [(m,) for m in ranked if m not in cuts][:1]
    return [mix for mix in found if mix]


def _is_small(settling: Settling) -> bool:
    """Whether there is a compressed plan that was predicted to be as small as asked for."""
    return not settling.choice.is_baseline and settling.is_to_fit
