"""Posteriors as the held-out KL sees them, whichever library they come from."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from jaxtyping import Float
from torch import Tensor, nn

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import shown_class_weights
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton, OutputRoot
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.debiasing.held_out_kl import KLTerms, prior_trace
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class Target:
    r"""Full-batch posterior of precision $N \tau H + P_0$ with $\tau = 1 / (\sigma^2 T)$ at the trained weights.

    Attributes:
        selection: its parameters.
        likelihood: of the outputs.
        choice: kind of the curvature H.
        prior_precision: diagonal of $P_0$.
        sigma_noise: $\sigma$, to be multiplied by the likelihood's relative noise of each output.
        temperature: T.
        n_data: N.
    """

    selection: ParameterSelection
    likelihood: Likelihood
    choice: BackendChoice
    prior_precision: Float[Tensor, " P"]
    sigma_noise: float
    temperature: float
    n_data: int | float

    @property
    def root(self) -> OutputRoot | None:
        """Root of the curvature; None for a Hessian.

        For a Monte-Carlo posterior it is that of the GGN, which it estimates: fresh draws would only add noise.
        """
        if self.choice.kind == "Monte-Carlo GGN":
            return GaussNewton(self.likelihood)
        return self.choice.root(self.likelihood)

    @property
    def likelihood_weight(self) -> float:
        r"""$N \tau$."""
        return self.n_data / (self.sigma_noise**2 * self.temperature)

    @property
    def context(self) -> str:
        """Description of everything that the constant of the KL depends on; the same for equal targets."""
        kind = self.choice.kind.removeprefix("Monte-Carlo ")
        over = self.selection.subset
        if over != "all weights":
            over = f"{over} {sha256(self.selection.description.encode()).hexdigest()[:8]}"
        return (
            f"weights {self.selection.fingerprint()[:12]}, {over}, {kind}, prior precision {self._shown_prior}, "
            f"sigma_noise {self._shown_noise}, temperature {self.temperature:.6g}, n_data {self.n_data:.12g}"
            + shown_class_weights(self.likelihood)
        )

    @property
    def _shown_noise(self) -> str:
        relative = getattr(self.likelihood, "relative_noise", None) or (1.0,)
        return " ".join(f"{self.sigma_noise * ratio:.6g}" for ratio in relative)

    @property
    def _shown_prior(self) -> str:
        prior = self.prior_precision
        if bool((prior == prior[0]).all()):
            return f"{float(prior[0]):.6g}"
        # equal numbers may have come in single or double precision
        digest = sha256(prior.float().cpu().contiguous().numpy().tobytes()).hexdigest()
        return f"{len(prior)} entries {digest[:8]}"


@dataclass(frozen=True, eq=False)
class Candidate:
    """Posterior whose held-out KL is estimated.

    Attributes:
        precision: of the posterior.
        target: full-batch posterior that it approximates.
        model: never written to.
        network: function from a first batch to the network at the posterior's mean.
        keys: of batches that are mappings.
        seed: of loading.
        n_fitted: number of fitted samples, or the sum of their weights.
        identities: of the fitted samples; None for posteriors of laplace-torch, which do not store them.
        are_some: whether these are only some of the fitted samples: those of drawn rows, after loading a state.
        processes: that share the passes over samples.
    """

    precision: LowRankPlusDiagonal
    target: Target
    model: nn.Module
    network: Callable[[Batch], Network]
    keys: MappingKeys
    seed: int
    n_fitted: float
    identities: SampleIdentities | None
    are_some: bool = False
    processes: Processes = ALONE

    @property
    def sharing(self) -> Processes:
        """Processes that share samples; this one alone where directions are divided, and all compute together."""
        return self.processes if self.precision.shard is None else ALONE

    @property
    def terms(self) -> KLTerms:
        """Terms of the KL that do not depend on samples."""
        trace = prior_trace(self.precision, self.target.prior_precision)
        return KLTerms(trace, float(self.precision.log_det), self.target.likelihood_weight)
