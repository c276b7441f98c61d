"""A weight as codes into small tables of values: the best tables, codes and tables again.

Every block of outputs x inputs has one table of k entries. The tables begin as exact k-means of the
weights, each counted by the mean square of its input. Codes are then given column by column, the
nearest entry each, and every later column absorbs what it can of the error (as ``feedback`` does for
grids). After that three steps take turns, none of which raises tr(D H D^T):

* entries: the least squares over all entries of a table, in the full metric, codes as they are;
* codes: coordinate descent, the best entry of a column while all others stand still;
* codes anew, by feedback with the new entries, kept for each table's outputs only where it is better.

The normal equations of the entries are never formed: their matrix times a vector is a gather, one
product with H and a scatter, the same work for one table and for one a row. Conjugate gradients need
a few of these, as a table's entries are coupled weakly.

Axes: g groups, m outputs and n inputs of a group, rows = g m outputs of all groups, b blocks of
outputs, c blocks of inputs, k entries.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.damping import check_moment, damped_inverse_upper
from tersor.ops.grids import check_finite
from tersor.ops.kmeans import optimal_codebooks

LARGEST_TABLE = 256  # codes are bytes
BLOCK = 128
# Of the gradient, relative to where it began: entries are then good to four digits of their last move.
SOLVED = 1e-4
MOST_STEPS = 50  # of conjugate gradients; they never raise the loss, solved or not
# Rounds end where the loss falls by less: what is left is below the choice of calibration samples.
ENOUGH = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookScheme:
    """How many entries a table has, and which weights share one.

    Attributes:
        entries: 2 .. 256; 16 make codes of 4 bits.
        outputs: Neighbouring outputs, over all groups, that share a table; 0: all.
        inputs: Neighbouring inputs that share a table; 0: all.
        value_dtype: What tables are stored in.
    """

    entries: int = 16
    outputs: int = 0
    inputs: int = 0
    value_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 2 <= self.entries <= LARGEST_TABLE:
            raise ConfigError(f"entries must be 2..{LARGEST_TABLE}, got {self.entries}")
        if self.outputs < 0 or self.inputs < 0:
            raise ConfigError(
                f"outputs {self.outputs} and inputs {self.inputs} that share a table must be >= 0; 0 is all"
            )
        if not self.value_dtype.is_floating_point:
            raise ConfigError(f"value_dtype must be a float type, got {self.value_dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """Codes and the tables they point into; the first of ``b`` blocks of outputs has tables[0]."""

    codes: UInt8[Tensor, "g m n"]
    tables: Float64[Tensor, "b c k"]  # ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookFit:
    """The best codes and tables, and how they were come by."""

    codebook: Codebook  # entries are values of ``value_dtype``
    losses: tuple[float, ...]  # tr(D H D^T): nearest entries, feedback, then each round
    loss: Float64[Tensor, " g"]  # of the result
    damping: float  # of the feedback, in use
    merged: float  # share of the k-means error that merging neighbours hid; 0: the tables began exact


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What all steps share."""

    W: Float64[Tensor, "g m n"]
    H: Float64[Tensor, "g n n"]
    U: Float64[Tensor, "g n n"]  # of the feedback, in the order of the columns
    order: Int64[Tensor, " n"]


def fit_codebook(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    scheme: CodebookScheme,
    *,
    rounds: int = 6,
    damping: float = 0.01,
) -> CodebookFit:
    """Tables and codes with a low output error.

    Args:
        weight: What to approach, W* where something changed before the layer; read only.
        H: Second moment, or covariance with the best bias shift, of the input; read only. Inputs that are
            never active (H_jj = 0) count nothing.
        scheme: Tables; their blocks must divide g m outputs and n inputs.
        rounds: Of entries and codes at most, >= 0; ends sooner where the loss falls by less than a
            thousandth.
        damping: Of the feedback, relative to the mean diagonal; more if H is singular even so.

    Returns:
        Codes and tables. From feedback on the losses never rise, but for the rounding of the entries to
        ``value_dtype``, which is part of the last.

    Raises:
        ConfigError: Negative ``rounds`` or damping.
        ShapeError: Blocks that do not divide the weight.
        NumericalError: The weight or H is not finite, or H not positive semi-definite.

    Source: Kim et al. 2024 (SqueezeLLM), arXiv:2306.07629, section 4.1, weighted k-means; Frantar et al.
    2022, arXiv:2210.17323, feedback; van Baalen et al. 2024 (GPTVQ), arXiv:2402.15319, section 3.3, update
    of the entries.
    """
    if rounds < 0:
        raise ConfigError(f"rounds must be >= 0, got {rounds}; 4 to 6 are enough")
    tables, merged = first_tables(weight, H, scheme)
    check_moment(H)
    problem, used = _problem(weight, H, damping)
    nearest = Codebook(codes=nearest_codes(problem.W, tables), tables=tables)
    current = Codebook(codes=_feedback(problem, tables), tables=tables)
    losses = [float(_row_losses(problem, book).sum()) for book in (nearest, current)]
    for _ in range(rounds):
        current = _round(problem, current)
        losses.append(float(_row_losses(problem, current).sum()))
        if losses[-1] > (1 - ENOUGH) * losses[-2]:
            break
    if rounds:
        current = _rounded_entries(problem, current, scheme.value_dtype)
        losses[-1] = float(_row_losses(problem, current).sum())
    loss = _row_losses(problem, current).sum(1)
    return CodebookFit(
        codebook=current, losses=tuple(losses), loss=loss, damping=used, merged=merged
    )


def first_tables(
    weight: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"], scheme: CodebookScheme
) -> tuple[Float64[Tensor, "b c k"], float]:
    """Exact k-means of the weights of each table, sum_ij H_jj (w_ij - q_ij)^2.

    Args:
        weight: Weight; read only.
        H: Of the input; only its diagonal counts here.
        scheme: Tables.

    Returns:
        Tables, and the share of their error that merging neighbours hid (see ``optimal_codebooks``).

    Raises:
        ShapeError: Blocks that do not divide the weight.
        NumericalError: The weight is not finite.
    """
    check_finite(weight, "weight")
    b, c = _blocks(weight, scheme)
    importance = H.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(weight)
    found = optimal_codebooks(
        _by_table(weight, b, c), _by_table(importance.clamp(min=0), b, c), scheme.entries
    )
    total = float(found.errors[:, -1].sum())
    merged = float(found.merged.sum()) / total if total > 0 else 0.0
    return found.tables.reshape(b, c, scheme.entries), merged


def decode(codebook: Codebook) -> Float64[Tensor, "g m n"]:
    """The weight: the entry of each code in the table of its block."""
    return _looked_up(codebook.codes, codebook.tables)


def nearest_codes(
    weight: Float[Tensor, "g m n"], tables: Float64[Tensor, "b c k"]
) -> UInt8[Tensor, "g m n"]:
    """Code of the nearest entry of each weight's table; ties go to the lower one."""
    b, c, k = tables.shape
    values = _by_table(weight.to(torch.float64), b, c)
    codes = torch.searchsorted(_bounds(tables).reshape(b * c, k - 1), values)
    return _from_tables(codes.to(torch.uint8), b, c, weight.shape)


def refit_entries(
    weight: Float64[Tensor, "g m n"],
    H: Float64[Tensor, "g n n"],
    codebook: Codebook,
    tolerance: float = SOLVED,
) -> Codebook:
    """Least squares over all entries, codes as they are: the minimum of tr(D H D^T).

    Args:
        weight: What to approach; read only.
        H: Second moment or covariance of the input; read only.
        codebook: Where to begin; entries without codes stay as they are. Read only.
        tolerance: Of the gradient, relative to where it began.

    Returns:
        Ascending tables, codes with them. The loss is never above that of the start.
    """
    missing = (weight - decode(codebook)) @ H
    b, c, k = codebook.tables.shape
    spread = H.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(weight)
    curvature = _gathered(codebook, spread)
    inverse = torch.where(curvature > 0, 1 / torch.where(curvature > 0, curvature, 1.0), 0.0)
    x = torch.zeros_like(curvature)
    r = _gathered(codebook, missing)
    z = inverse * r
    p, power = z, (r * z).sum(1, keepdim=True)
    end = tolerance**2 * power
    for _ in range(min(c * k, MOST_STEPS)):
        pulled = _gathered(codebook, _looked_up(codebook.codes, p.reshape(b, c, k)) @ H)
        bend = (p * pulled).sum(1, keepdim=True)
        length = torch.where(bend > 0, power / torch.where(bend > 0, bend, 1.0), 0.0)
        x, r = x + length * p, r - length * pulled
        z = inverse * r
        before, power = power, (r * z).sum(1, keepdim=True)
        if bool((power <= end).all()):
            break
        p = z + p * torch.where(before > 0, power / torch.where(before > 0, before, 1.0), 0.0)
    return _ascending(
        Codebook(codes=codebook.codes, tables=codebook.tables + x.reshape(b, c, k))
    )


def descend_codes(
    weight: Float64[Tensor, "g m n"],
    H: Float64[Tensor, "g n n"],
    codebook: Codebook,
    sweeps: int = 1,
) -> Codebook:
    """Coordinate descent on tr(D H D^T): the best entry of each column while all others stand still.

    Args:
        weight: What to approach; read only.
        H: Second moment or covariance of the input; read only.
        codebook: Where to begin; read only. Columns with H_jj = 0 stay.
        sweeps: Passes over all columns; ends sooner once a pass changes nothing.

    Returns:
        Codes whose loss, row by row, is not above that of the start.

    Source: Behdin et al. 2023 (QuantEase), arXiv:2309.01885, eq. 7, with tables in place of a grid.
    """
    codes = codebook.codes.mT.contiguous()
    columns = _Columns.of(codebook.tables, weight.shape)
    for _ in range(sweeps):
        current = _looked_up(codes.mT, codebook.tables).mT.contiguous()
        gradient = H @ (weight.mT - current)
        if not _descend_once_(codes, current, gradient, H, columns):
            break
    return Codebook(codes=codes.mT.contiguous(), tables=codebook.tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Tables as the loops over columns need them."""

    tables: Float64[Tensor, "b c k"]
    bounds: Float64[Tensor, "b c edges"]
    width: int  # inputs that share a table

    @classmethod
    def of(cls, tables: Float64[Tensor, "b c k"], shape: torch.Size) -> "_Columns":
        return cls(tables=tables, bounds=_bounds(tables), width=shape[2] // tables.shape[1])

    def nearest(
        self, column: int, values: Float64[Tensor, "g m"]
    ) -> tuple[Int64[Tensor, "g m"], Float64[Tensor, "g m"]]:
        """Codes and entries of the values of one column."""
        block = column // self.width
        rows = values.reshape(len(self.tables), -1)
        codes = torch.searchsorted(self.bounds[:, block].contiguous(), rows)
        entries = self.tables[:, block].gather(1, codes)
        return codes.reshape(values.shape), entries.reshape(values.shape)


def _problem(
    weight: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"], damping: float
) -> tuple[_Problem, float]:
    metric = H.to(torch.float64)
    diagonal = metric.diagonal(dim1=1, dim2=2)
    # One order for all groups: the most active inputs first, while the others can make up for them.
    order = diagonal.mean(0).argsort(descending=True, stable=True)
    alive = diagonal > 0  # couplings of inputs without activity are rounding noise
    coupled = metric * alive.unsqueeze(2) * alive.unsqueeze(1)
    U, used = damped_inverse_upper(coupled[:, order][:, :, order], damping)
    return _Problem(W=weight.to(torch.float64), H=metric, U=U, order=order), used


def _feedback(problem: _Problem, tables: Float64[Tensor, "b c k"]) -> UInt8[Tensor, "g m n"]:
    """Nearest entries column by column; the columns still to come absorb what they can."""
    columns = _Columns.of(tables, problem.W.shape)
    W = problem.W.mT[:, problem.order].contiguous()
    codes = torch.empty_like(W, dtype=torch.uint8)
    U, places = problem.U, problem.order.tolist()
    pivots = U.diagonal(dim1=1, dim2=2)
    for start in range(0, W.shape[1], BLOCK):
        stop = min(start + BLOCK, W.shape[1])
        errors = torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            found, entries = columns.nearest(places[j], W[:, j])
            error = (W[:, j] - entries).div_(pivots[:, j, None])
            W[:, j + 1 : stop].addcmul_(U[:, j, j + 1 : stop, None], error.unsqueeze(1), value=-1)
            codes[:, places[j]], errors[:, j - start] = found.to(torch.uint8), error
        W[:, stop:].baddbmm_(U[:, start:stop, stop:].mT, errors, alpha=-1)
    return codes.mT.contiguous()


def _round(problem: _Problem, codebook: Codebook) -> Codebook:
    """Entries, then codes: by descent, or anew where that is better for a block of outputs."""
    W, H = problem.W, problem.H
    fitted = refit_entries(W, H, codebook)
    descended = descend_codes(W, H, fitted)
    anew = Codebook(codes=_feedback(problem, fitted.tables), tables=fitted.tables)
    anew = descend_codes(W, H, anew)
    b = len(fitted.tables)
    losses = [_row_losses(problem, book).reshape(b, -1) for book in (descended, anew)]
    better = (losses[1] < losses[0]).reshape(*W.shape[:2], 1)
    codes = torch.where(better, anew.codes, descended.codes)
    return Codebook(codes=codes, tables=fitted.tables)


def _rounded_entries(problem: _Problem, codebook: Codebook, dtype: torch.dtype) -> Codebook:
    stored = codebook.tables.to(dtype).to(torch.float64)
    return descend_codes(problem.W, problem.H, replace(codebook, tables=stored))


def _descend_once_(
    codes: UInt8[Tensor, "g n m"],
    current: Float64[Tensor, "g n m"],
    gradient: Float64[Tensor, "g n m"],
    H: Float64[Tensor, "g n n"],
    columns: _Columns,
) -> bool:
    """One pass over all columns; overwrites codes, their entries and the gradient H D."""
    changed = False
    for start in range(0, H.shape[1], BLOCK):
        stop = min(start + BLOCK, H.shape[1])
        moves = torch.zeros_like(current[:, start:stop])
        for j in range(start, stop):
            bend = H[:, j, j, None]
            wish = gradient[:, j] / torch.where(bend > 0, bend, 1.0)
            found, entries = columns.nearest(j, current[:, j] + wish)
            move = entries - current[:, j]
            # A tie or rounding noise must not move a code that is a best one already.
            closer = ((wish - move).abs() < wish.abs() * (1 - 1e-9)) & (bend > 0)
            move = torch.where(closer, move, 0.0)
            codes[:, j] = torch.where(closer, found.to(torch.uint8), codes[:, j])
            current[:, j] += move
            moves[:, j - start] = move
            gradient[:, j + 1 : stop].addcmul_(
                H[:, j + 1 : stop, j, None], move.unsqueeze(1), value=-1
            )
        if bool(moves.any()):
            changed = True
            gradient[:, stop:].baddbmm_(H[:, stop:, start:stop], moves, alpha=-1)
    return changed


def _row_losses(problem: _Problem, codebook: Codebook) -> Float64[Tensor, "g m"]:
    D = problem.W - decode(codebook)
    return ((D @ problem.H) * D).sum(2)


def _ascending(codebook: Codebook) -> Codebook:
    tables, order = codebook.tables.sort(dim=2, stable=True)
    places = order.argsort(dim=2)
    codes = _looked_up(codebook.codes, places).to(torch.uint8)
    return Codebook(codes=codes, tables=tables)


def _bounds(tables: Float64[Tensor, "b c k"]) -> Float64[Tensor, "b c edges"]:
    """Where the nearest entry changes."""
    return (tables[:, :, 1:] + tables[:, :, :-1]) / 2


def _blocks(weight: Float[Tensor, "g m n"], scheme: CodebookScheme) -> tuple[int, int]:
    """How many blocks of outputs and inputs."""
    groups, outputs, inputs = weight.shape
    counts = []
    for name, total, share in (
        ("outputs", groups * outputs, scheme.outputs),
        ("inputs", inputs, scheme.inputs),
    ):
        size = share or total
        if not size or total % size:
            raise ShapeError(
                f"weight {tuple(weight.shape)} [group, out, in]: {total} {name} do not split into blocks of {share}; "
                f"use a divisor of {total}, or 0 for one block"
            )
        counts.append(total // size)
    return counts[0], counts[1]


def _by_table(values: Shaped[Tensor, "g m n"], b: int, c: int) -> Shaped[Tensor, "bc members"]:
    rows = values.reshape(b, -1, c, values.shape[2] // c)
    return rows.transpose(1, 2).reshape(b * c, -1)


def _from_tables(
    values: Shaped[Tensor, "bc members"], b: int, c: int, shape: torch.Size
) -> Shaped[Tensor, "g m n"]:
    rows = values.reshape(b, c, -1, shape[2] // c).transpose(1, 2)
    return rows.reshape(shape).contiguous()


def _looked_up(
    codes: UInt8[Tensor, "g m n"], tables: Shaped[Tensor, "b c k"]
) -> Shaped[Tensor, "g m n"]:
    b, c, _ = tables.shape
    found = tables.flatten(0, 1).gather(1, _by_table(codes, b, c).long())
    return _from_tables(found, b, c, codes.shape)


def _gathered(codebook: Codebook, values: Float64[Tensor, "g m n"]) -> Float64[Tensor, "b ck"]:
    """Sum of the values that belong to each entry."""
    b, c, k = codebook.tables.shape
    sums = values.new_zeros(b * c, k)
    sums.scatter_add_(1, _by_table(codebook.codes, b, c).long(), _by_table(values, b, c))
    return sums.reshape(b, c * k)
