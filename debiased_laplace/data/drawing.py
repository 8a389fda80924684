r"""Draw rows with probabilities in proportion to scores, so that weights by inverse probability leave sums unbiased.

A row is one of the r rows of one of n samples. It is drawn if its permanent random number is below its inclusion
probability (Poisson sampling): draws of different rows are independent, draws of more rows contain those of fewer, and
neither the order of the samples nor the number of processes matters. A row that is not drawn from the samples read so
far is not drawn from more of them either, so one pass suffices, and only drawn rows are held.

References:
    Särndal, Swensson & Wretman (1992), Model Assisted Survey Sampling, §3.5 (Poisson sampling); Ohlsson (1995),
    Coordination of samples using permanent random numbers; Steele, Lea & Flood (2014), doi 10.1145/2660193.2660195 (the
    generator whose mixing function is used).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

SHARE_OF_FLOOR = 0.1
"""Share of the expected number of rows that is the same for all samples; the rest is in proportion to the scores."""


@dataclass(frozen=True, eq=False)
class RowDraw:
    """Rows held by a draw, ordered by sample and row, with what their probabilities depend on.

    Attributes:
        samples: index of each row's sample among those scored.
        rows: number of the row within its sample.
        scores: in proportion to which rows are drawn.
        floors: share of the row in its sample.
        numbers: permanent random numbers.
        attached: whatever was computed for each row.
    """

    samples: Int64[Tensor, " R"]
    rows: Int64[Tensor, " R"]
    scores: Float[Tensor, " R"]
    floors: Float[Tensor, " R"]
    numbers: Float[Tensor, " R"]
    attached: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, chosen: Tensor) -> "RowDraw":
        """Return some of the rows."""
        return RowDraw(
            self.samples[chosen], self.rows[chosen], self.scores[chosen], self.floors[chosen], self.numbers[chosen],
            self.attached[chosen.to(self.attached.device)],
        )  # fmt: skip

    def bare(self) -> "RowDraw":
        """Return the rows with nothing attached."""
        return replace(self, attached=self.scores.new_zeros(len(self), 0))

    @classmethod
    def joined(cls, parts: list["RowDraw"]) -> "RowDraw":
        """Return the rows of several parts."""
        names = ("samples", "rows", "scores", "floors", "numbers", "attached")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, eq=False)
class Population:
    """Sums over all rows that were scored, which say how probable a row is.

    Attributes:
        n_samples: number of samples.
        n_with_rows: number of samples with a positive score.
        n_positive: number of rows with a positive score, which are those that can be drawn.
        scores_left: sum of the scores of rows that are not held.
        floors_left: likewise of their floors.
    """

    n_samples: int = 0
    n_with_rows: int = 0
    n_positive: int = 0
    scores_left: float = 0.0
    floors_left: float = 0.0

    def adding(self, positive: Tensor, left: Float[Tensor, "n r"], floors_left: Float[Tensor, "n r"]) -> "Population":
        """Return the sums with these samples added, given which rows have a positive score, and what is not held."""
        return Population(
            self.n_samples + len(positive),
            self.n_with_rows + int(positive.any(1).sum()),
            self.n_positive + int(positive.sum()),
            self.scores_left + float(left.sum()),
            self.floors_left + float(floors_left.sum()),
        )

    def leaving(self, rows: "RowDraw") -> "Population":
        """Return the sums where these rows are held no longer."""
        return replace(
            self,
            scores_left=self.scores_left + float(rows.scores.sum()),
            floors_left=self.floors_left + float(rows.floors.sum()),
        )

    def factors(self, held: RowDraw, n_rows: int) -> tuple[float, float]:
        r"""Return a and b of the inclusion probabilities $\min(1, a s + b f)$ of scores s and floors f.

        Their sum is `n_rows`, or all are 1 where no more rows have a positive score.
        """
        if self.n_positive <= n_rows:
            return math.inf, 1.0
        b = min(SHARE_OF_FLOOR * n_rows / self.n_with_rows, 1.0)
        # by increasing a at which a row becomes certain, the first k are certain; rows that are not held are not
        certain_from, order = ((1 - b * held.floors) / held.scores).sort()
        scores, floors = held.scores[order], held.floors[order]

        def of_the_others(values: Tensor, left: float) -> Tensor:
            return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]) + left

        k = torch.arange(len(order) + 1)
        rest = n_rows - k - b * of_the_others(floors, self.floors_left)
        a = rest / of_the_others(scores, self.scores_left).clamp_min(torch.finfo(scores.dtype).tiny)
        certain = int((a[:-1] > certain_from).cumprod(0).sum())
        return _rounded(float(a[certain])), b


@dataclass(frozen=True, eq=False)
class Rows:
    r"""Rows that were drawn.

    Attributes:
        positions: of each row: of its sample in the data set, of its outputs in the sample (0 without such positions),
            and number of the row there.
        part: 0 for rows that give directions, 1 for those that give magnitudes ("held_out"); the fold
            ("cross_fitted"); 0 ("same_batch").
        inclusion_probabilities: probability of each row to be drawn.
        design_effect: estimated variance of the trace of the curvature under this draw, relative to as many rows
            drawn uniformly.
        known_share: share of the trace that is known because its rows were drawn,
            $\sum k_r \|v_r\|^2 / \sum w_r \|v_r\|^2$.
    """

    positions: Int64[Tensor, "R 3"]
    part: Int64[Tensor, " R"]
    inclusion_probabilities: Float[Tensor, " R"]
    design_effect: float
    known_share: float

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def __repr__(self) -> str:
        return (
            f"Rows({self.n} rows of {len(self.positions[:, 0].unique())} samples, known share of the trace "
            f"{self.known_share:.3f}, design effect {self.design_effect:.3g})"
        )


@dataclass(frozen=True, eq=False)
class RowDrawer:
    """A draw of about `n_rows` rows from samples that are added batch by batch.

    Attributes:
        n_rows: expected number of rows; with as many positive scores or fewer, all of them are drawn.
        seed: of the permanent random numbers.
        population: sums over all rows added.
        held: the rows drawn so far; None before any sample was added.
        factors: a and b of the probabilities so far.
    """

    n_rows: int
    seed: int
    population: Population = Population()
    held: RowDraw | None = None
    factors: tuple[float, float] = (math.inf, 1.0)

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held)

    def adding(
        self,
        scores: Float[Tensor, "n r"],
        sizes: Float[Tensor, "n r"],
        keys: Int64[Tensor, " n"],
        attach: Callable[[Int64[Tensor, " m"], Int64[Tensor, " m"]], Tensor],
    ) -> "RowDrawer":
        """Return the draw from these samples too.

        Args:
            scores: of every row, proportional to its expected squared norm; rows with score 0 are never drawn.
            sizes: factor of the scores by which a sample's floor is shared out among its rows.
            keys: identities of the samples: equal keys have equal random numbers.
            attach: function from samples (of these) and rows to what is kept with each row; for those drawn only.
        """
        positive = scores > 0
        floors = torch.where(positive, sizes / sizes.sum(1, keepdim=True), 0.0)
        numbers = permanent_numbers(keys, scores.shape[1], self.seed)
        a, b = self.factors
        stay = positive & (numbers < torch.where(positive, a * scores, 0.0) + b * floors)
        samples, rows = stay.nonzero().unbind(1)
        n_before = self.population.n_samples
        new = RowDraw(
            samples + n_before, rows, scores[stay], floors[stay], numbers[stay], attached=scores.new_zeros(len(rows), 0)
        )
        population = self.population.adding(positive, scores * ~stay, floors * ~stay)
        held = new if self.held is None else RowDraw.joined([self.held.bare(), new])
        factors = population.factors(held, self.n_rows)
        drawn = held.numbers < _probabilities(held, factors)
        population = population.leaving(held.at(~drawn))
        of_new = drawn[-len(new) :] if len(new) else drawn[:0]
        attached = attach(samples[of_new], rows[of_new])
        if self.held is not None:
            before = self.held.attached
            kept = drawn[: len(before)]
            before = before if bool(kept.all()) else before[kept.to(before.device)]
            attached = torch.cat([before, attached]) if len(attached) else before
        return replace(self, population=population, held=replace(held.at(drawn), attached=attached), factors=factors)

    @classmethod
    def merged(cls, parts: list["RowDrawer"], numbers: list[Int64[Tensor, " _n"]]) -> "RowDrawer":
        """Return the draw from the samples of several drawers with the same seed, given the numbers of their samples.

        It is the draw of one drawer to which all samples were added, up to the rounding of sums.
        """
        held = [
            replace(part.held, samples=own[part.held.samples])
            for part, own in zip(parts, numbers, strict=True)
            if part.held is not None
        ]
        if not held:
            return parts[0]
        names = ("n_samples", "n_with_rows", "n_positive", "scores_left", "floors_left")
        population = Population(*(sum(getattr(part.population, name) for part in parts) for name in names))
        rows = RowDraw.joined(held)
        places = rows.samples * (int(rows.rows.max()) + 1 if len(rows) else 1) + rows.rows
        rows = rows.at(places.argsort())
        factors = population.factors(rows, parts[0].n_rows)
        drawn = rows.numbers < _probabilities(rows, factors)
        population = population.leaving(rows.at(~drawn))
        return cls(parts[0].n_rows, parts[0].seed, population, rows.at(drawn), factors)

    def drawn(self, n_rows: int | None = None) -> tuple[RowDraw, Float[Tensor, " R"]]:
        """Return the drawn rows and their inclusion probabilities.

        Args:
            n_rows: expected number of rows, at most that of the drawer; None: its own.
        """
        assert self.held is not None  # for the type checker
        probabilities = _probabilities(self.held, self.population.factors(self.held, n_rows or self.n_rows))
        stay = self.held.numbers < probabilities
        return self.held.at(stay), probabilities[stay]

    def expected(self, n_rows: int | None = None) -> int:
        """Return the expected number of rows drawn."""
        return min(n_rows or self.n_rows, self.population.n_positive)


def _rounded(a: float) -> float:
    """Round to 32 bits, so that the order in which scores were added up does not matter."""
    mantissa, exponent = math.frexp(a)
    return math.ldexp(round(mantissa * 2**32), exponent - 32)


def _probabilities(rows: RowDraw, factors: tuple[float, float]) -> Float[Tensor, " R"]:
    a, b = factors
    return (a * rows.scores + b * rows.floors).clamp_max(1.0)


def chances_of_the_rest(probabilities: Float[Tensor, " R"], share_a: float, share_b: float) -> Float[Tensor, " R"]:
    r"""Return the probability of a row to be in part b, given that it is not in part a.

    Weighted by the inverse, the rows of b are an unbiased estimate of all rows outside a.

    Args:
        probabilities: $\pi$, of a row to be drawn.
        share_a: probability of a drawn row to be dealt to a.
        share_b: likewise to b.
    """
    return share_b * probabilities / (1 - share_a * probabilities)


def permanent_numbers(positions: Int64[Tensor, " n"], n_rows: int, seed: int) -> Float[Tensor, "n r"]:
    """Return a uniform number in (0, 1) for every row of every sample, which depends on position, row and seed only."""
    with np.errstate(over="ignore"):
        of_seed = _mixed(np.asarray([seed % 2**64], dtype=np.uint64))
        of_samples = _mixed(positions.numpy().astype(np.uint64) ^ of_seed)
        numbers = _mixed(of_samples[:, None] + np.arange(1, n_rows + 1, dtype=np.uint64) * _STEP)
    # the 53 bits of a double, and the middle of each interval
    return torch.from_numpy(((numbers >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers (splitmix64)."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
