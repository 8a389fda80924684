r"""The KL divergence of a posterior to the full-batch posterior, estimated without computing the latter.

For an approximation with precision $\hat P$, and the full-batch posterior with precision $N \tau H_D + P_0$ at the same
mean,

$$KL = J(\hat P) + const,$$
$$J = \tfrac12 [ N\tau\, \mathrm{tr}(\hat P^{-1} H_D) + \mathrm{tr}(\hat P^{-1} P_0) + \log\det \hat P ],$$

with the same constant for all approximations. J is linear in $H_D$, so samples that $\hat P$ has not seen estimate it
without bias. On samples that it was fitted to, J favours the biased posterior.
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
        standard_error: from the spread over the held-out samples, or from the draw of rows; 0 if the value is exact.
        n: number of held-out samples, or of drawn rows.
        terms: term of each held-out sample, whose mean enters the value, or of each drawn row, whose sum does.
        sample_keys: identities of the samples or rows.
        context: model, mean, prior, temperature and N as one string; only values with the same context compare.
        exact: whether the posterior was fitted to all data, so that nothing is estimated.
        unseen: share of the held-out samples' population that is not among them.
        left_out: probability of each drawn row not to be drawn; None for samples.
    """

    value: float
    standard_error: float
    n: int
    terms: Float[Tensor, " n"]
    sample_keys: Int64[Tensor, " n"]
    context: str
    exact: bool
    unseen: float = 1.0
    left_out: Float[Tensor, " n"] | None = None

    def __repr__(self) -> str:
        unit = "held-out samples" if self.left_out is None else "drawn rows"
        return f"HeldOutKL({self.value:.2f} ± {self.standard_error:.2f} nats up to a constant, {self.n} {unit})"

    def __sub__(self, other: "HeldOutKL") -> "KLDifference":
        """Return the difference of two posteriors' KL to the full batch, paired by sample.

        Raises:
            ValueError: if the contexts or the samples differ.
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
        left_out = other.left_out if self.exact else self.left_out
        if left_out is not None:
            order = torch.arange(n) if self.exact or other.exact else self.sample_keys.argsort()
            return KLDifference(self.value - other.value, _error_of_sum(terms, left_out[order]), n)
        # populations differ if the fitted samples do; the larger one is conservative
        unseen = max([kl.unseen for kl in (self, other) if not kl.exact], default=0.0)
        return KLDifference(self.value - other.value, _error_of_mean(terms, unseen), n)


@dataclass(frozen=True)
class KLDifference:
    """Difference of two posteriors' KL to the full batch.

    Attributes:
        value: in nats; negative if the first posterior is closer.
        standard_error: from the paired spread over the held-out samples.
        n: number of held-out samples.
    """

    value: float
    standard_error: float
    n: int


def _paired(left: HeldOutKL, right: HeldOutKL) -> Tensor:
    """Return differences of the terms of the same samples; an exact value has no sampling error to pair."""
    if left.exact or right.exact:
        return right.terms if left.exact else left.terms
    if (left.left_out is None) != (right.left_out is None):
        raise ValueError(
            "One held-out KL is from held-out samples, the other from rows drawn of all of them: expected the same "
            "loader for both."
        )
    order_left, order_right = left.sample_keys.argsort(), right.sample_keys.argsort()
    if not torch.equal(left.sample_keys[order_left], right.sample_keys[order_right]):
        raise ValueError(
            "The difference of two held-out KLs is paired; expected the same held-out samples (of drawn rows: the same "
            f"loader, n_rows and seed), got two different sets of {left.n} and {right.n}."
        )
    return left.terms[order_left] - right.terms[order_right]


@dataclass(frozen=True)
class KLTerms:
    r"""Terms of $J$ that depend on the posterior alone.

    Attributes:
        prior_trace: $\mathrm{tr}(\hat P^{-1} P_0)$.
        log_det: $\log\det \hat P$, in nats.
        likelihood_weight: $N \tau$, with $\tau = 1 / (\sigma^2 T)$.
    """

    prior_trace: float
    log_det: float
    likelihood_weight: float


def prior_trace(precision: LowRankPlusDiagonal, prior: Float[Tensor, " P"]) -> float:
    r"""Return $\mathrm{tr}(P^{-1} P_0)$ for a diagonal prior."""
    # for a prior that is constant in each block of the basis, coordinates in the basis avoid cancellation
    variances = precision.coordinate_variances
    if precision.basis is not None:
        own = [block.size for block in precision.basis.blocks]
        parts = prior.split(own if precision.shard is None else list(precision.shard.sizes))
        if any(bool((part != part[0]).any()) for part in parts if len(part)):
            variances = precision.covariance_diagonal
    return float((variances.double() * prior.double()).sum())


def sample_terms(posterior: KLTerms, traces: Iterable[Float[Tensor, " _"]]) -> Float[Tensor, " n"]:
    r"""Return $\tfrac12 N \tau\, \mathrm{tr}(\hat P^{-1} H_n)$ of each sample, in double precision on the CPU.

    Args:
        posterior: terms of the posterior.
        traces: $\mathrm{tr}(\hat P^{-1} H_n)$ of consecutive batches of samples.
    """
    parts = [batch.double().cpu() for batch in traces]
    return 0.5 * posterior.likelihood_weight * (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64))


def estimate_held_out_kl(
    posterior: KLTerms,
    held_out: Float[Tensor, " n"],
    fitted: Float[Tensor, " B"] | None,
    *,
    n_data: float,
    n_fitted: float,
    n_held_out: float,
    sample_keys: Int64[Tensor, " n"],
    context: str,
) -> HeldOutKL:
    """Estimate J from the fitted samples with their exact share, and the held-out samples for the rest.

    Args:
        posterior: terms of the posterior.
        held_out: `sample_terms` of the held-out samples.
        fitted: `sample_terms` of all fitted samples; None: the held-out samples estimate their share too.
        n_data: size N of the data set.
        n_fitted: number of samples that the posterior was fitted to, or the sum of their weights.
        n_held_out: number of held-out samples, or the sum of their weights.
        sample_keys: identities of the held-out samples.
        context: string that must agree for two values to be compared.

    Returns:
        The estimate.
    """
    share = min(n_fitted / n_data, 1.0) if fitted is not None else 0.0
    n = len(held_out)
    own = 0.5 * posterior.prior_trace + 0.5 * posterior.log_det
    seen = share * float(fitted.mean()) if fitted is not None else 0.0
    terms = (1 - share) * held_out
    # finite-population correction: held-out samples are drawn from those outside the fit, or, if they estimate the
    # fitted samples' share too, from all
    population = n_data - n_fitted if fitted is not None else n_data
    unseen = 0.0 if is_all(n_held_out, population) else max(1 - n_held_out / population, 0.0)
    terms_mean = float(terms.mean()) if n else 0.0
    exact = fitted is not None and is_all(n_fitted, n_data)
    error = _error_of_mean(terms, unseen)
    return HeldOutKL(own + seen + terms_mean, error, n, terms, sample_keys, context, exact, unseen)


def estimate_from_rows(
    posterior: KLTerms,
    traces: Float[Tensor, " R"],
    left_out: Float[Tensor, " R"],
    *,
    row_keys: Int64[Tensor, " R"],
    context: str,
) -> HeldOutKL:
    r"""Estimate J from rows that were drawn from all N samples, independently of the posterior.

    Args:
        posterior: terms of the posterior.
        traces: $w_r v_r^\top \hat P^{-1} v_r$ of each row, whose sum is the estimate of $\mathrm{tr}(\hat P^{-1} H_D)$.
        left_out: probability of each row not to be drawn.
        row_keys: identities of the rows.
        context: as in `estimate_held_out_kl`.

    Returns:
        The estimate; its standard error is that of the draw.
    """
    terms = 0.5 * posterior.likelihood_weight * traces.double().cpu()
    value = 0.5 * posterior.prior_trace + 0.5 * posterior.log_det + float(terms.sum())
    error = _error_of_sum(terms, left_out)
    return HeldOutKL(value, error, len(terms), terms, row_keys, context, False, left_out=left_out)


def _error_of_sum(terms: Float[Tensor, " R"], left_out: Float[Tensor, " R"]) -> float:
    """Return the standard error of a sum over rows drawn independently, each weighted by its inverse probability."""
    return math.sqrt(float(left_out @ terms.square()))


def is_all(n: float, n_data: float) -> bool:
    """Return whether samples are all the data, by the sums of their weights, which may be rounded."""
    return math.isclose(n, n_data, rel_tol=1e-6)


def _error_of_mean(terms: Float[Tensor, " n"], unseen: float) -> float:
    """Return the standard error of a sample's mean, given the share of the population outside the sample."""
    n = len(terms)
    if n > 1:
        return float(terms.std(correction=1)) * math.sqrt(unseen / n)
    return math.inf if n == 1 and unseen > 0 else 0.0
