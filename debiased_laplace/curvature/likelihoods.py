r"""Likelihoods by name: those of outputs that enter a factor each, and the softmax likelihood."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from debiased_laplace.curvature.classification import Classification
from debiased_laplace.curvature.likelihood import IndependentOutputs, Likelihood, by_output, check_shape

_MANY = 2.0**30  # rate above which a count is drawn as a Gaussian number


@dataclass(frozen=True)
class Regression(IndependentOutputs):
    r"""Gaussian likelihood with unit noise.

    The loss is $\tfrac12 \|y - f\|^2$. Targets are (n, C), or (n,) for a single output.

    Attributes:
        relative_noise: noise of each output, of geometric mean 1; None: 1 for all. Losses and curvatures are in its
            units, so that $\sum_c (y_c - f_c)^2 / 2 r_c^2$ is the loss.
    """

    name = "regression"
    relative_noise: tuple[float, ...] | None = None

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that the targets are floating-point and have the shape of the outputs, or (n,) for one output."""
        n, C = outputs.shape
        if not targets.is_floating_point() or (targets.shape != (n, C) and (C != 1 or targets.shape != (n,))):
            raise ValueError(
                f"Expected regression targets as floats of the outputs' shape {tuple(outputs.shape)}; got "
                f"{targets.dtype} of shape {tuple(targets.shape)}."
            )
        if self.relative_noise is not None and len(self.relative_noise) != C:
            raise ValueError(
                f"Expected sigma_noise as one number, or one for each of {C} outputs; got {len(self.relative_noise)}."
            )

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return half the squared error of each sample."""
        return 0.5 * self._residuals(outputs, targets).square().sum(-1)

    def hessian_diagonal(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Return the inverse noise variances."""
        return self._scaled(self._scaled(torch.ones_like(outputs)))

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return output minus target, divided by the noise variances."""
        return self._scaled(self._residuals(outputs, targets))

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """Draw one standard normal number per output."""
        return _standard_normal(n, n_outputs, generator)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return outputs plus noise."""
        noise = noise.to(outputs.dtype)
        return outputs + (noise if self.relative_noise is None else noise * outputs.new_tensor(self.relative_noise))

    def _residuals(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return (output - target) / noise."""
        return self._scaled(outputs - by_output(targets, outputs))

    def _scaled(self, x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        return x if self.relative_noise is None else x / x.new_tensor(self.relative_noise)


@dataclass(frozen=True)
class Binary(IndependentOutputs):
    r"""Independent Bernoulli labels, one for each logit f: $p = 1 / (1 + e^{-f})$.

    Targets are 0 or 1, or probabilities (soft labels), (n, C), or (n,) for a single logit. With one logit it is the
    softmax of (0, f).
    """

    name = "binary"
    gives_probabilities = True

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that targets have the shape of the outputs, and are between 0 and 1."""
        n, C = outputs.shape
        check_shape("binary", n, C, targets)
        if bool(((targets < 0) | (targets > 1)).any()):
            raise ValueError(
                f"Expected binary targets of 0 and 1, or probabilities; got {float(targets.min()):g} to "
                f"{float(targets.max()):g}."
            )

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the cross entropy of each sample, summed over its labels."""
        y = by_output(targets, outputs)
        return -(y * logsigmoid(outputs) + (1 - y) * logsigmoid(-outputs)).sum(-1)

    def hessian_diagonal(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Return p (1 - p)."""
        return torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return p - y, without cancellation where y is 0 or 1."""
        y = by_output(targets, outputs)
        return (1 - y) * torch.sigmoid(outputs) - y * torch.sigmoid(-outputs)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """Draw one uniform number per label."""
        return torch.rand(n, n_outputs, generator=generator, dtype=torch.float64, device=generator.device)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return labels by the inverse distribution function."""
        return (noise < torch.sigmoid(outputs)).to(outputs.dtype)

    def probabilities(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Return p."""
        return torch.sigmoid(outputs)


@dataclass(frozen=True)
class Poisson(IndependentOutputs):
    r"""Poisson counts with the rates $e^f$, one for each output.

    Targets are counts (n, C), or (n,) for a single output.
    """

    name = "poisson"

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that targets have the shape of the outputs, and are counts."""
        n, C = outputs.shape
        check_shape("poisson", n, C, targets)
        if bool((targets < 0).any()) or (targets.is_floating_point() and bool((targets != targets.round()).any())):
            raise ValueError(
                f"Expected counts as poisson targets, whole numbers of at least 0; got {float(targets.min()):g} to "
                f"{float(targets.max()):g}{'' if bool((targets < 0).any()) else ', some of them no whole numbers'}."
            )

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        r"""Return $\sum_c e^{f_c} - y_c f_c + \log y_c!$ of each sample."""
        y = by_output(targets, outputs)
        return (outputs.exp() - y * outputs + torch.lgamma(y + 1)).sum(-1)

    def hessian_diagonal(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Return the rates."""
        return outputs.exp()

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return rate minus count."""
        return outputs.exp() - by_output(targets, outputs)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """Draw one uniform number per output."""
        return torch.rand(n, n_outputs, generator=generator, dtype=torch.float64, device=generator.device)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return counts by the inverse distribution function."""
        rates = outputs.exp().to(noise)
        few = rates.clamp_max(_MANY)
        # beyond these, the distribution function is 1 in double precision
        low, high = torch.zeros_like(few) - 1, (few + 40 * few.sqrt() + 60).ceil()
        widest = float((high - low).max()) if high.numel() else 1.0
        for _ in range(math.ceil(math.log2(widest)) + 1):
            middle = torch.floor((low + high) / 2)
            # P(y <= k) is the regularized upper incomplete gamma function
            enough = torch.special.gammaincc(middle + 1, few) >= noise
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        # in a form that is infinite where the rate is
        normal = (rates * (1 + torch.special.ndtri(noise) * rates.rsqrt())).round()
        return torch.where(rates < _MANY, high, normal).to(outputs.dtype)

    def target_moments(
        self, mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"]
    ) -> tuple[Float[Tensor, "n T"], Float[Tensor, "n T"], Float[Tensor, "n T"]]:
        """Return moments of the counts: of log-normal rates, whose mean is also the mean variance of a count."""
        rate = (mean + variance / 2).exp()
        return rate, variance.expm1() * rate.square(), rate


@dataclass(frozen=True)
class Heteroscedastic(IndependentOutputs):
    r"""Gaussian likelihood whose noise the network predicts: the outputs are T means m, then T log variances s.

    The loss is $\tfrac12 \sum_t \log 2\pi + s_t + (y_t - m_t)^2 e^{-s_t}$. Its second derivative in the outputs may be
    indefinite; $\Lambda$ is its expectation over the targets, the Fisher matrix with the diagonal $e^{-s}$ and 1/2.

    References:
        Nix & Weigend (1994), doi 10.1109/ICNN.1994.374138 (the loss); Immer, Palumbo, Marx & Vogt (2023),
        arXiv 2307.08312 (Laplace approximations of it).
    """

    name = "heteroscedastic"

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that there are two outputs for each target, and that targets are floating-point."""
        n, C = outputs.shape
        if C % 2:
            raise ValueError(
                f"A heteroscedastic likelihood expects two outputs for each target, the means and then the log "
                f"variances; the model has {C}."
            )
        check_shape("heteroscedastic", n, C // 2, targets)
        if not targets.is_floating_point():
            raise ValueError(f"Expected heteroscedastic targets as floats; got {targets.dtype}.")

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the negative log density of each sample, summed over its targets."""
        m, s = outputs.chunk(2, dim=-1)
        squares = (by_output(targets, outputs) - m).square()
        return 0.5 * (math.log(2 * math.pi) + s + squares * (-s).exp()).sum(-1)

    def hessian_diagonal(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""Return $e^{-s}$ of the means and 1/2 of the log variances."""
        s = outputs.chunk(2, dim=-1)[1]
        return torch.cat([(-s).exp(), torch.full_like(s, 0.5)], dim=-1)

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        r"""Return $(m - y) e^{-s}$ and $(1 - (y - m)^2 e^{-s}) / 2$."""
        m, s = outputs.chunk(2, dim=-1)
        residuals, precision = m - by_output(targets, outputs), (-s).exp()
        return torch.cat([residuals * precision, 0.5 * (1 - residuals.square() * precision)], dim=-1)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """Draw one standard normal number per target."""
        return _standard_normal(n, n_outputs // 2, generator)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return means plus noise."""
        m, s = outputs.chunk(2, dim=-1)
        return m + noise.to(outputs.dtype) * (s / 2).exp()

    def target_moments(
        self, mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"]
    ) -> tuple[Float[Tensor, "n T"], Float[Tensor, "n T"], Float[Tensor, "n T"]]:
        """Return moments of the targets, of which the log-normal noise gives the mean variance."""
        (m, s), (of_mean, of_log) = mean.chunk(2, dim=-1), variance.chunk(2, dim=-1)
        return m, of_mean, (s + of_log / 2).exp()


def _standard_normal(n: int, n_numbers: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
    return torch.randn(n, n_numbers, generator=generator, dtype=torch.float64, device=generator.device)


_LIKELIHOODS: dict[str, Likelihood] = {
    "classification": Classification(),
    "regression": Regression(),
    # the logits of a pair's two rewards are a binary classification: Bradley & Terry's likelihood
    "reward_modeling": Classification(),
    "binary": Binary(),
    "heteroscedastic": Heteroscedastic(),
    "poisson": Poisson(),
}


def names_of_likelihoods() -> list[str]:
    """Return the names of the likelihoods that there are."""
    return sorted(_LIKELIHOODS)


def likelihood_named(name: str | Likelihood, class_weights: Any = None) -> Likelihood:
    """Return the likelihood of a name.

    Args:
        name: of the likelihood, or a likelihood of one's own.
        class_weights: factor of the loss of each class, (C,), for "classification"; None: 1.

    Raises:
        ValueError: if there is none, or class weights are not such numbers or not for it.
    """
    if not isinstance(name, Likelihood) and (not isinstance(name, str) or name not in _LIKELIHOODS):
        raise ValueError(f"likelihood must be one of {names_of_likelihoods()}, or a Likelihood; got {name!r}.")
    if isinstance(name, Likelihood) and type(name) not in {type(known) for known in _LIKELIHOODS.values()}:
        _check_own(name)
    if class_weights is None:
        return name if isinstance(name, Likelihood) else _LIKELIHOODS[name]
    if name != "classification":
        raise ValueError(f"class_weights are for likelihood='classification'; got likelihood={name!r}.")
    try:
        weights = torch.as_tensor(class_weights, dtype=None if isinstance(class_weights, Tensor) else torch.float64)
        weights = weights.detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Expected class_weights as numbers, one for each class; got {class_weights!r}.") from error
    valid = weights.ndim == 1 and bool((weights >= 0).all() and weights.isfinite().all() and weights.any())
    if not valid:
        raise ValueError(
            f"Expected class_weights as one number for each class, none negative and not all 0; got {class_weights!r}."
        )
    return Classification(weights if weights.is_floating_point() else weights.double())


def _check_own(likelihood: Likelihood) -> None:
    """Check a likelihood of a user.

    Raises:
        ValueError: if its name is missing or that of another one, or it says that it gives probabilities.
    """
    name = getattr(likelihood, "name", None)
    if not isinstance(name, str) or name in _LIKELIHOODS:
        raise ValueError(
            f"Expected the name of a likelihood of your own as a text that is none of {names_of_likelihoods()}; got "
            f"{name!r}."
        )
    if likelihood.gives_probabilities:
        raise ValueError(
            f"gives_probabilities is of built-in likelihoods; expected False of {name!r}, whose predictions are of "
            "targets."
        )


WITH_CLASS_WEIGHTS = " with class_weights "
"""Between a likelihood's name and its class weights, in states and contexts."""


def shown_class_weights(likelihood: Likelihood) -> str:
    """Return the class weights of a likelihood as text; nothing without them."""
    weights = getattr(likelihood, "class_weights", None)
    return "" if weights is None else f"{WITH_CLASS_WEIGHTS}{[float(f'{w:.6g}') for w in weights.tolist()]}"


def in_columns(targets: Tensor, n_outputs: int) -> Tensor:
    """Return floating-point targets (n,) of a single output as (n, 1), and all others as they are."""
    flat = targets.ndim == 1 and n_outputs == 1 and targets.is_floating_point()
    return targets[:, None] if flat else targets
