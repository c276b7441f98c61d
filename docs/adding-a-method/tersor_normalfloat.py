"""NormalFloat: weights as codes into the 16 quantiles of a normal distribution (arXiv:2305.14314)."""

import torch

from tersor.core.errors import ConfigError
from tersor.core.packing import Packing
from tersor.core.records import Candidate
from tersor.graph.storing import aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.codebook import Codebook, looked_up, nearest_codes
from tersor.ops.storing import pack_tables

LEVEL = "lut4_weight"  # stored as 4-bit codes into tables; costs the time of floats
UPPER, LOWER = (
    torch.special.ndtri(torch.linspace(0.5, 0.9677083, n, dtype=torch.float64)) for n in (9, 8)
)
QUANTILES = torch.cat([-LOWER[1:].flip(0), UPPER]) / UPPER[-1]  # 16, from -1 to 1


class NormalFloat:
    """One table an output: the quantiles times the scale that costs its output least."""

    kinds = ("format",)  # of sites: layers, as opposed to widths, branches and additions
    for_size = by_name = True  # saves bytes only; has to be named: methods=("normalfloat", ...)

    def propose(self, site, statistics):
        """Levels with their bytes; Tersor measures their errors."""
        if not worth_packing(statistics):
            return []
        size = stored_bytes(site, self.layout(site).size_bytes())
        return [Candidate(site=site.name, level=LEVEL, method="normalfloat", size_bytes=size)]

    def apply(self, site, candidate, statistics):
        """The stored weight for the current weight and statistics."""
        if candidate.level != LEVEL:
            raise ConfigError(f"{site.name}: normalfloat has no level {candidate.level!r}")
        aim = aim_of(site, statistics)  # behind compressed layers: refitted to the original
        h = 1.0 if aim.metric is None else aim.metric.diagonal(dim1=1, dim2=2).unsqueeze(1)
        best = least = None
        for fraction in (1.0, 0.9, 0.8, 0.7, 0.6):
            scale = fraction * aim.target.abs().amax(2).reshape(-1, 1, 1)
            tables = (scale * QUANTILES).half().double()  # as they are stored
            codes = nearest_codes(aim.target, tables)
            error = ((looked_up(codes, tables) - aim.target).square() * h).sum(2).reshape(-1, 1, 1)
            best = tables if best is None else torch.where(error < least, tables, best)
            least = error if least is None else torch.minimum(error, least)
        codebook = Codebook(codes=nearest_codes(aim.target, best), tables=best)
        packed = pack_tables(self.layout(site), codebook)
        return stored_change(site, LEVEL, packed, (aim, statistics))  # with the bias that it needs

    def layout(self, site):
        return Packing(kind="table", shape=site.shape, bits=4, per_output=True)
