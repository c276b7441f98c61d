"""Elements chosen by indices, shifted, mirrored."""

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Result, Shape, rule

CHOSEN = "elements that indices choose"


@rule("index")
def index(call: Call) -> Result:
    """Indexed dimensions stay whole; the others go along."""
    x, indices = call.dims("self"), list(call["indices"])
    places = [i for i, entry in enumerate(indices) if entry is not None]
    for i in places:
        call.chosen(x[i], indices[i], CHOSEN)
        call.freeze(call.of(indices[i]) or [], "indices that choose elements")
    rank = len(call.out) - (len(x) - len(places))
    contiguous = places == list(range(places[0], places[-1] + 1))
    rest = [d for i, d in enumerate(x) if i not in places]
    start = places[0] if contiguous else 0
    chosen = [free(n) for n in call.out[start : start + rank]]
    found: Shape = [*rest[:start], *chosen, *rest[start:]]
    if [d.size for d in found] != call.out:  # masks of booleans
        call.freeze(x, "elements that a mask chooses")
        return call.blank()
    return found


@rule("index_select")
def index_select(call: Call) -> Result:
    """One dimension is indexed."""
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    call.chosen(x[at], call["index"], CHOSEN)
    call.freeze(call.dims("index"), CHOSEN)
    x[at] = free(call.out[at])
    return x


@rule("gather", "take_along_dim")
def gather(call: Call) -> Result:
    """The indexed dimension stays whole; the index must be repeated along the others."""
    numbers = call["index"] or call["indices"]
    x, where = call.dims("self"), call.of(numbers) or []
    if call["dim"] is None:  # of all elements in a row
        counted = [call.numbers[numbers]] if numbers in call.numbers else []
        call.freeze([*x, *where, *counted], CHOSEN)
        return call.blank()
    at = call.dim(call["dim"], len(x))
    call.chosen(x[at], numbers, CHOSEN)
    call.freeze(where[at], CHOSEN)
    found: Shape = []
    for i, (dim, other) in enumerate(zip(x, where, strict=True)):
        if i == at:
            found.append(free(call.out[i]))
        elif dim.size != other.size:
            call.freeze([dim, other], CHOSEN)
            found.append(free(call.out[i]))
        else:
            call.unify(dim, other)
            found.append(dim)
    return found


@rule("take")
def chosen(call: Call) -> Result:
    """Any element may be chosen."""
    call.freeze_all("elements that values choose")
    return call.blank()


@rule("roll")
def roll(call: Call) -> Result:
    """A shift along a dimension needs all of its elements."""
    x = call.dims("self")
    dims = call["dims"] or range(len(x))
    call.freeze([x[d] for d in dims], "its elements are shifted")
    return x


@rule("flip", "fliplr", "flipud")
def flip(call: Call) -> Result:
    """Mirrored dimensions: their elements in reverse."""
    x = call.dims("self")
    dims = call["dims"] if call["dims"] is not None else [1 if call.name == "fliplr" else 0]
    for d in dims:
        x[d] = Dim(x[d].rows[::-1], x[d].zero)
    return x


@rule("tril", "triu")
def triangle(call: Call) -> Result:
    """Positions matter in the last two dimensions."""
    x = call.dims("self")
    call.freeze(x[-2:], "positions are compared over it")
    return x


@rule("bucketize")
def bucketize(call: Call) -> Result:
    """Each value by itself; the borders stay."""
    call.freeze(call.dims("boundaries"), "borders that values are compared with")
    return [Dim(d.rows, zero=False) for d in call.maybe("self") or []]


@rule("searchsorted")
def searchsorted(call: Call) -> Result:
    """Each value by itself, in its own row where there are several rows of borders."""
    borders, values = call.dims("sorted_sequence"), call.maybe("self") or []
    call.freeze(borders[-1], "borders that values are compared with")
    if len(borders) > 1:
        for a, b in zip(borders[:-1], values[:-1], strict=True):
            call.unify(a, b)
    return [Dim(d.rows, zero=False) for d in values]
