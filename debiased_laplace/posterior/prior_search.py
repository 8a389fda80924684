"""What a grid search over the prior precision has found, and what there is to be said against it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Edge = Literal["lower", "upper"]

_FLAT = 1e-6  # relative range of losses that is rounding in single precision


@dataclass(frozen=True)
class AgainstMap:
    """Negative log-likelihoods on the same validation samples, in nats a sample; in regression also per output.

    Attributes:
        map_loss: of the plain network; in regression with the observation noise.
        laplace_loss: of the posterior predictive under the chosen prior.
        difference: the posterior's less the network's; 0 where it is rounding.
        standard_error: of the difference, paired by sample; NaN from a single sample.
    """

    map_loss: float
    laplace_loss: float
    difference: float
    standard_error: float

    @property
    def worse(self) -> bool:
        """Whether the posterior predicts detectably worse than the plain network."""
        return self.difference > 0 and not self.doubtful

    @property
    def doubtful(self) -> bool:
        """Whether the difference is below two standard errors, or these are not known."""
        return not abs(self.difference) >= 2 * self.standard_error

    def __str__(self) -> str:
        verdict = "worse" if self.worse else "not detectably worse"
        return (
            f"{verdict} than the plain network (MAP): negative log-likelihood {self.laplace_loss:.4g} against "
            f"{self.map_loss:.4g}, a paired difference of {self.difference:+.2g} ± {self.standard_error:.1g}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class PriorSearch:
    """A grid of prior precisions and what they scored on validation data.

    Attributes:
        grid: increasing.
        losses: on the validation data; NaN or infinite where a prior could not be scored.
        standard_errors: of the losses, from their spread over samples; None for the user's own loss.
        chosen: the prior precision with the lowest finite loss. That it was the best of many on these very data makes
            its loss look lower than it is.
        against_map: how it compares with the plain network; None where the targets are not the likelihood's.
        loss_name: what was minimised.
        n: validation samples.
    """

    grid: Float[Tensor, " g"]
    losses: Float[Tensor, " g"]
    standard_errors: Float[Tensor, " g"] | None
    chosen: float
    against_map: AgainstMap | None
    loss_name: str
    n: int

    @property
    def map_loss(self) -> float | None:
        """Negative log-likelihood of the plain network; None where it could not be had."""
        return None if self.against_map is None else self.against_map.map_loss

    @property
    def worse_than_map(self) -> bool | None:
        """Whether the best prior still predicts detectably worse than the plain network; None where that is unknown."""
        known = self.against_map is not None and not math.isnan(self.against_map.standard_error)
        return self.against_map.worse if known else None  # type: ignore[union-attr]

    @property
    def at_edge(self) -> Edge | None:
        """The edge of the grid that the chosen prior lies at; None inside, and for a grid of one."""
        if len(self.grid) == 1:
            return None
        return {0: "lower", len(self.grid) - 1: "upper"}.get(self._position)  # type: ignore[return-value]

    @property
    def flat(self) -> bool:
        """Whether the loss is the same for all priors but for rounding, so that it chooses nothing."""
        usable = self.losses[self.losses.isfinite()]
        spread = float(usable.max() - usable.min())
        return len(self.grid) > 1 and spread <= _FLAT * max(1.0, abs(float(usable.min())))

    @property
    def cautions(self) -> list[str]:
        """What the user has to know, in words: a flat loss or an edge of the grid, and a posterior that does harm."""
        found = []
        if self.flat:
            found.append(
                f"The loss ({self.loss_name}) is the same for every prior precision {self._range}, up to rounding: "
                f"{self.chosen:.3g} was not chosen by the data. Expected a loss that looks at the variance; the "
                "squared error of the mean does not."
            )
        elif self.at_edge is not None:
            way, end = {"lower": ("Lower", "min"), "upper": ("Raise", "max")}[self.at_edge]
            found.append(
                f"The best prior precision, {self.chosen:.3g}, is at the {self.at_edge} edge of the grid "
                f"{self._range}: a better one may lie beyond. {way} log_prior_prec_{end} to find out."
            )
        if self.against_map is not None and self.against_map.worse:
            found.append(
                f"Even the best prior precision, {self.chosen:.3g} {self._range}, predicts the validation data "
                f"{self.against_map} ({self.n} samples). It is set all the same. Try a larger "
                "log_prior_prec_max, another link_approx or (regression) another sigma_noise; otherwise keep the plain "
                "network's predictions."
            )
        return found

    def __repr__(self) -> str:
        i = self._position
        error = "" if self.standard_errors is None else f" ± {float(self.standard_errors[i]):.2g}"
        lines = [
            f"prior precision {self.chosen:.4g}, the best {self._range}, on {self.n} validation samples",
            f"  {self.loss_name} {float(self.losses[i]):.4g}{error}",
        ]
        if self.against_map is None:
            lines.append("  not compared with the plain network: the targets are not those of the likelihood")
        else:
            lines.append(f"  {self.against_map}")
        if self.at_edge is not None:
            lines.append(f"  at the {self.at_edge} edge of the grid")
        failed = int((~self.losses.isfinite()).sum())
        if failed:
            lines.append(f"  {failed} of the grid's priors have no finite loss")
        return "\n".join(lines)

    @property
    def _position(self) -> int:
        return best_of(self.losses)

    @property
    def _range(self) -> str:
        return f"of {len(self.grid)} from {float(self.grid[0]):.3g} to {float(self.grid[-1]):.3g}"


def best_of(losses: Float[Tensor, " g"]) -> int:
    """The position of the lowest finite loss, of equal ones the first.

    Raises:
        ValueError: if none is finite.
    """
    if not bool(losses.isfinite().any()):
        raise ValueError(f"Expected a finite loss; all {len(losses)} are NaN or infinite.")
    return int(torch.where(losses.isfinite(), losses, torch.inf).argmin())


def against_map(laplace: Float[Tensor, " n"], plain: Float[Tensor, " n"], rounding: float) -> AgainstMap:
    """Compare negative log-likelihoods, paired by sample.

    Args:
        laplace: of the posterior predictive.
        plain: of the network.
        rounding: relative error of a prediction; differences below it are none.

    Returns:
        Means, their difference and its standard error.
    """
    excess = laplace - plain
    mean, plain_mean = float(excess.mean()), float(plain.mean())
    return AgainstMap(
        map_loss=plain_mean,
        laplace_loss=float(laplace.mean()),
        difference=0.0 if abs(mean) <= rounding * max(1.0, abs(plain_mean)) else mean,
        standard_error=standard_error_of_mean(excess),
    )


def standard_error_of_mean(values: Float[Tensor, " n"]) -> float:
    """From the spread over samples; NaN for a single one."""
    n = len(values)
    return float(values.std(correction=1)) / n**0.5 if n > 1 else float("nan")
