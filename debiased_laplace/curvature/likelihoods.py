r"""Likelihoods: the loss of the outputs, its gradient, its second derivative and a root of the latter.

The loss of a sample is the negative log-likelihood up to constants, with unit noise: cross entropy for
classification, $\tfrac12 \|y - f\|^2$ for regression. Observation noise and temperature multiply it later.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


@runtime_checkable
class Likelihood(Protocol):
    """Interface of likelihoods."""

    name: str

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that the targets fit the outputs.

        Raises:
            ValueError: if they do not.
        """
        ...

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """Return the sum of the samples' losses, in nats."""
        ...

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the loss of each sample, in nats."""
        ...

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        r"""Return columns of $S$, with $S S^\top = \Lambda = \partial^2 \ell / \partial f^2$."""
        ...

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:
        r"""Return $S^\top X$ without forming $S$."""
        ...

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""Return $\Lambda x$ without forming $\Lambda$."""
        ...

    def hessian_quadratics(self, outputs: Float[Tensor, "n C"], Q: Float[Tensor, "C k"] | None) -> Float[Tensor, "n k"]:
        r"""Return $q_i^\top \Lambda q_i$ of each sample without forming $\Lambda$ or its root; None: the identity."""
        ...

    def hessian_sum(self, outputs: Float[Tensor, "n C"], weights: Float[Tensor, " n"]) -> Float[Tensor, "C C"]:
        r"""Return $\sum_n w_n \Lambda_n$."""
        ...

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        r"""Return $\partial \ell / \partial f$."""
        ...

    def weights(self, targets: Tensor) -> Float[Tensor, " n"] | None:
        """Return the factor of each sample's loss that its target implies; None: 1."""
        ...

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """Draw the noise that `drawn_targets` converts to targets, on the generator's device."""
        ...

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return targets drawn from the model's own likelihood."""
        ...


@dataclass(frozen=True, eq=False)
class Classification:
    r"""Softmax likelihood of class labels, or of class probabilities (soft labels).

    The loss of soft labels y is $-\sum_c w_c y_c \log p_c$ with class weights w, as that of
    `torch.nn.CrossEntropyLoss`. It is $m = \sum_c w_c y_c$ times the loss of the soft labels $w_c y_c / m$: m is the
    sample's weight, and the methods below are those of the normalized labels.

    Attributes:
        class_weights: w, (C,); None: 1.
    """

    class_weights: Float[Tensor, " C"] | None = None
    name = "classification"

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that targets are integers (n,) in [0, C) or probabilities (n, C), and C is at least 2."""
        n, C = outputs.shape
        if C < 2:
            raise ValueError(f"Classification expects at least 2 outputs (logits); the model has {C}.")
        if self.class_weights is not None and len(self.class_weights) != C:
            raise ValueError(f"Expected {C} class_weights, one for each output; got {len(self.class_weights)}.")
        if targets.is_floating_point() and targets.shape == (n, C):
            sums = targets.sum(1)
            # rounding of half precision is allowed
            if bool((targets < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
                raise ValueError("Expected soft labels as probabilities (n, C), at least 0 and with a sum of 1.")
            return
        if targets.is_floating_point() or targets.shape != (n,):
            raise ValueError(
                f"Expected class labels as integers of shape ({n},), or as probabilities ({n}, {C}); got "
                f"{targets.dtype} of shape "
                f"{tuple(targets.shape)}."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= C:
            raise ValueError(f"Expected class labels between 0 and {C - 1} for {C} outputs; got {low} to {high}.")

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """Return the summed cross entropy."""
        return cross_entropy(outputs, self._labels(outputs, targets), reduction="sum")

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the cross entropy of each sample."""
        return cross_entropy(outputs, self._labels(outputs, targets), reduction="none")

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        r"""Return columns of $S = \mathrm{diag}(\sqrt p) - p \sqrt p^\top$, a root of $\mathrm{diag}(p) - p p^\top$."""
        p = torch.softmax(outputs, dim=-1)
        chosen = p[..., columns].sqrt()
        unit = torch.eye(outputs.shape[-1], dtype=p.dtype, device=p.device)[:, columns]
        return (unit - p[..., :, None]) * chosen[..., None, :]

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:
        r"""Return $\sqrt p \circ (X - p^\top X)$."""
        p = torch.softmax(outputs, dim=-1)[..., None]
        return p.sqrt() * (X - (p * X).sum(-2, keepdim=True))

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""Return $p \circ (x - p^\top x)$."""
        p = torch.softmax(outputs, dim=-1)
        return p * (x - (p * x).sum(-1, keepdim=True))

    def hessian_quadratics(self, outputs: Float[Tensor, "n C"], Q: Float[Tensor, "C k"] | None) -> Float[Tensor, "n k"]:
        r"""Return the variances of $q_i$ under p, with the value of the most probable class as origin.

        With $x_c = Q_c - Q_{c^*}$ they are $\sum_{c \ne c^*} p_c x_c^2 - (\sum_{c \ne c^*} p_c x_c)^2$, whose terms are
        of the size of $1 - p_{c^*}$.
        """
        p, rest, top = _without_top(outputs)
        if Q is None:
            return p * _complements(p, rest, top)
        Q = Q.to(p.dtype)
        first, second, origin = rest @ Q, rest @ Q.square(), Q[top[:, 0]]
        share = rest.sum(1, keepdim=True)
        squares = second - 2 * origin * first + share * origin.square()
        return (squares - (first - share * origin).square()).clamp_min(0)

    def hessian_sum(self, outputs: Float[Tensor, "n C"], weights: Float[Tensor, " n"]) -> Float[Tensor, "C C"]:
        r"""Return $\sum_n w_n (\mathrm{diag}(p_n) - p_n p_n^\top)$."""
        p, rest, top = _without_top(outputs)
        weights = weights.to(p)
        diagonal = weights @ (p * _complements(p, rest, top))
        return -((p * weights[:, None]).T @ p).diagonal_scatter(-diagonal)

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return the probabilities minus the label's unit vector, or minus the soft labels."""
        p = torch.softmax(outputs, dim=-1)
        labels = self._labels(outputs, targets)
        return p - (labels if labels.is_floating_point() else one_hot(labels, outputs.shape[-1]).to(p.dtype))

    def weights(self, targets: Tensor) -> Float[Tensor, " n"] | None:
        """Return the class weight of each label, of soft labels its mean."""
        if self.class_weights is None:
            return None
        w = self.class_weights.to(targets.device)
        return targets.to(w.dtype) @ w if targets.is_floating_point() else w[targets.long()]

    def _labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return labels, or normalized soft labels."""
        if not targets.is_floating_point():
            return targets.long()
        soft = targets.to(outputs.dtype)
        if self.class_weights is not None:
            soft = soft * self.class_weights.to(outputs)
        # without weight nothing of the sample enters
        return soft / soft.sum(-1, keepdim=True).clamp_min(torch.finfo(soft.dtype).tiny)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:  # noqa: ARG002
        """Draw one uniform number per sample."""
        return torch.rand(n, 1, generator=generator, dtype=torch.float64)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return labels by the inverse distribution function."""
        below = torch.softmax(outputs, dim=-1).to(noise.dtype).cumsum(-1)
        return (below < noise * below[..., -1:]).sum(-1).clamp_max(outputs.shape[-1] - 1)


@dataclass(frozen=True)
class Regression:
    r"""Gaussian likelihood with unit noise.

    Targets are (n, C), or (n,) for a single output.

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

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """Return half the summed squared error."""
        return 0.5 * self._residuals(outputs, targets).square().sum()

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return half the squared error of each sample."""
        return 0.5 * self._residuals(outputs, targets).square().sum(-1)

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        """Return columns of the identity, each divided by its output's noise."""
        unit = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        unit = self._scaled(unit)[:, columns]
        return unit.expand(*outputs.shape[:-1], *unit.shape)

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:  # noqa: ARG002
        """Return X, each row divided by its output's noise."""
        return X if self.relative_noise is None else self._scaled(X.mT).mT

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:  # noqa: ARG002
        """Return x, divided by the noise variances."""
        return self._scaled(self._scaled(x))

    def hessian_quadratics(self, outputs: Float[Tensor, "n C"], Q: Float[Tensor, "C k"] | None) -> Float[Tensor, "n k"]:
        """Return the squared norms of vectors divided by the noise, the same for each sample."""
        units = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device) if Q is None else Q.to(outputs)
        return self._scaled(units.T).square().sum(1).expand(len(outputs), -1)

    def hessian_sum(self, outputs: Float[Tensor, "n C"], weights: Float[Tensor, " n"]) -> Float[Tensor, "C C"]:
        """Return the inverse noise variances times the sum of the weights."""
        return torch.diag(self._scaled(self._scaled(weights.to(outputs).sum().expand(outputs.shape[1]))))

    def weights(self, targets: Tensor) -> Float[Tensor, " n"] | None:  # noqa: ARG002
        """Return None: every target counts alike."""
        return None

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return output minus target, divided by the noise variances."""
        return self._scaled(self._residuals(outputs, targets))

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """Draw one standard normal number per output."""
        return torch.randn(n, n_outputs, generator=generator, dtype=torch.float64)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Return outputs plus noise."""
        noise = noise.to(outputs.dtype)
        return outputs + (noise if self.relative_noise is None else noise * outputs.new_tensor(self.relative_noise))

    def _residuals(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Return (output - target) / noise."""
        # targets (n,) of a single output would be broadcast to (n, n)
        y = targets[..., None] if targets.ndim == outputs.ndim - 1 else targets
        return self._scaled(outputs - y.to(outputs.dtype))

    def _scaled(self, x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        return x if self.relative_noise is None else x / x.new_tensor(self.relative_noise)


def _without_top(outputs: Float[Tensor, "n C"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probabilities, those of all but the most probable class, and that class (n, 1)."""
    p, top = torch.softmax(outputs, dim=-1), outputs.argmax(1, keepdim=True)
    return p, p.scatter(1, top, 0.0), top


def _complements(p: Tensor, rest: Tensor, top: Tensor) -> Tensor:
    """Return 1 - p without cancellation in that of the most probable class."""
    return (1 - p).scatter(1, top, rest.sum(1, keepdim=True))


LOGITS_NEEDED = (
    "expected logits, of which the softmax is taken. Remove the model's last softmax, or return the probabilities' "
    "logarithms (log_softmax), which are logits"
)
"""What to do with a classifier whose outputs `are_probabilities`."""


def are_probabilities(outputs: Float[Tensor, "n C ..."]) -> bool:
    """Return whether the outputs of all samples are non-negative and sum to 1 over the classes."""
    # half precision leaves rounding errors of a percent in a sum; logits of a whole batch do not come as close
    sums = outputs.double().sum(1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < (1e-2 if len(outputs) > 1 else 1e-4)).all())


_LIKELIHOODS: dict[str, Likelihood] = {
    "classification": Classification(),
    "regression": Regression(),
    # the logits of a pair's two rewards are a binary classification: Bradley & Terry's likelihood
    "reward_modeling": Classification(),
}


def likelihood_named(name: str, class_weights: Any = None) -> Likelihood:
    """Return the likelihood of a name.

    Args:
        name: of the likelihood.
        class_weights: factor of the loss of each class, (C,), for "classification"; None: 1.

    Raises:
        ValueError: if there is none, or class weights are not such numbers or not for it.
    """
    if not isinstance(name, str) or name not in _LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {sorted(_LIKELIHOODS)}; got {name!r}.")
    if class_weights is None:
        return _LIKELIHOODS[name]
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
