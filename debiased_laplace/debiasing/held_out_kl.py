r"""The distance of a posterior to the full-batch posterior, estimated without computing the latter.

For an approximation with precision $\hat P$, and the full-batch posterior with precision $N \tau H_D + P_0$ at the same
mean,

$$KL = J(\hat P) + const,$$
$$J = \tfrac12 [ N\tau\, \mathrm{tr}(\hat P^{-1} H_D) + \mathrm{tr}(\hat P^{-1} P_0) + \log\det \hat P ],$$

with one constant for all approximations. J is linear in $H_D$, so samples that $\hat P$ has not seen estimate it
without bias. On samples that it was fitted to, J prefers the biased posterior: there it must not be computed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal


@dataclass(frozen=True, eq=False)
class HeldOutKL:
    """Held-out KL of a posterior to the full batch, up to a constant that posteriors of one model share.

    Attributes:
        value: in nats.
        standard_error: of the value, from the spread over the held-out samples; 0 where the value is exact.
        n: number of held-out samples.
        terms: what each held-out sample says, whose mean enters the value.
        sample_keys: by which the samples are known.
        context: model, mean, prior, temperature and N in one string; only equal ones compare.
        exact: whether all data were used, so that nothing is left to estimate.
        unseen: the share of the population, from which the held-out samples were drawn, that is not among them.
    """

    value: float
    standard_error: float
    n: int
    terms: Float[Tensor, " n"]
    sample_keys: Int64[Tensor, " n"]
    context: str
    exact: bool
    unseen: float = 1.0

    def __repr__(self) -> str:
        return (
            f"HeldOutKL({self.value:.2f} ± {self.standard_error:.2f} nats up to a constant, {self.n} held-out samples)"
        )

    def __sub__(self, other: "HeldOutKL") -> "KLDifference":
        """The difference of two posteriors' KL to the full batch, paired by sample.

        Raises:
            ValueError: if the posteriors do not share the constant, or the samples differ.
        """
        if not isinstance(other, HeldOutKL):
            return NotImplemented
        if self.context != other.context:
            raise ValueError(
                "Held-out KLs compare only between posteriors of the same model, mean, prior precision, "
                "temperature, observation noise and n_data; expected equal ones: "
                f"{self.context} against {other.context}."
            )
        terms = _paired(self, other)
        n = len(terms)
        # populations differ where the fitted samples do; the larger one errs on the safe side
        unseen = max([kl.unseen for kl in (self, other) if not kl.exact], default=0.0)
        return KLDifference(self.value - other.value, _error_of_mean(terms, unseen), n)


@dataclass(frozen=True)
class KLDifference:
    """How much further one posterior is from the full batch than another.

    Attributes:
        value: in nats; negative where the first one is closer.
        standard_error: from the paired spread over the held-out samples.
        n: number of held-out samples.
    """

    value: float
    standard_error: float
    n: int


def _paired(left: HeldOutKL, right: HeldOutKL) -> Tensor:
    """Differences of the terms of the same samples; an exact value has no sampling error to pair."""
    if left.exact or right.exact:
        return right.terms if left.exact else left.terms
    order_left, order_right = left.sample_keys.argsort(), right.sample_keys.argsort()
    if not torch.equal(left.sample_keys[order_left], right.sample_keys[order_right]):
        raise ValueError(
            "The difference of two held-out KLs is paired by sample; expected the same held-out samples, "
            f"got two different sets of {left.n} and {right.n}."
        )
    return left.terms[order_left] - right.terms[order_right]


@dataclass(frozen=True)
class KLTerms:
    r"""What $J$ needs to know of a posterior, whatever it is.

    Attributes:
        prior_trace: $\mathrm{tr}(\hat P^{-1} P_0)$.
        log_det: $\log\det \hat P$, in nats.
        likelihood_weight: $N \tau$, with $\tau = 1 / (\sigma^2 T)$.
    """

    prior_trace: float
    log_det: float
    likelihood_weight: float


def prior_trace(precision: LowRankPlusDiagonal, prior: Float[Tensor, " P"]) -> float:
    r"""$\mathrm{tr}(P^{-1} P_0)$ for a diagonal prior.

    Where the prior is constant in each block of a basis, the trace is the same in the coordinates of the basis, in
    which no difference of large numbers is needed.
    """
    variances = precision.coordinate_variances
    if precision.basis is not None:
        parts = prior.split([block.size for block in precision.basis.blocks])
        if any(bool((part != part[0]).any()) for part in parts if len(part)):
            variances = precision.covariance_diagonal
    return float((variances.double() * prior.double()).sum())


def sample_terms(posterior: KLTerms, traces: Iterable[Float[Tensor, " _"]]) -> Float[Tensor, " n"]:
    r"""$\tfrac12 N \tau\, \mathrm{tr}(\hat P^{-1} H_n)$ of each sample, in double precision on the CPU.

    Args:
        posterior: the posterior's own terms.
        traces: $\mathrm{tr}(\hat P^{-1} H_n)$ of some samples after others.
    """
    parts = [some.double().cpu() for some in traces]
    return 0.5 * posterior.likelihood_weight * (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64))


def estimate_held_out_kl(
    posterior: KLTerms,
    held_out: Float[Tensor, " n"],
    fitted: Float[Tensor, " B"] | None,
    *,
    n_data: int,
    n_fitted: int,
    sample_keys: Int64[Tensor, " n"],
    context: str,
) -> HeldOutKL:
    """Put J together: the fitted samples' exact share, the held-out samples for the rest.

    Args:
        posterior: the posterior's own terms.
        held_out: `sample_terms` of the held-out samples.
        fitted: `sample_terms` of all samples that it was fitted to; None leaves their share to the held-out ones.
        n_data: N.
        n_fitted: number of samples that the posterior was fitted to.
        sample_keys: by which the held-out samples are known.
        context: what has to agree for two values to compare.

    Returns:
        The estimate.
    """
    share = n_fitted / n_data if fitted is not None else 0.0
    n = len(held_out)
    own = 0.5 * posterior.prior_trace + 0.5 * posterior.log_det
    inside = share * float(fitted.mean()) if fitted is not None else 0.0
    terms = (1 - share) * held_out
    # drawing without replacement leaves less to chance: from the samples outside the fit, or, where these stand for
    # the fitted ones too, from all
    population = n_data - n_fitted if fitted is not None else n_data
    unseen = max(1 - n / population, 0.0) if population else 0.0
    terms_mean = float(terms.mean()) if n else 0.0
    exact = fitted is not None and n_fitted == n_data
    error = _error_of_mean(terms, unseen)
    return HeldOutKL(own + inside + terms_mean, error, n, terms, sample_keys, context, exact, unseen)


def _error_of_mean(terms: Float[Tensor, " n"], unseen: float) -> float:
    """Standard error of the mean of a sample, of whose population this share is unseen."""
    n = len(terms)
    if n > 1:
        return float(terms.std(correction=1)) * math.sqrt(unseen / n)
    return math.inf if n == 1 and unseen > 0 else 0.0
