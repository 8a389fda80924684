r"""Softmax likelihood of labels, in forms that do not cancel where a sample is certain."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from debiased_laplace.curvature.likelihood import Likelihood


@dataclass(frozen=True, eq=False)
class Classification(Likelihood):
    r"""Softmax likelihood of class labels, or of class probabilities (soft labels).

    The loss of soft labels y is $-\sum_c w_c y_c \log p_c$ with class weights w, as that of
    `torch.nn.CrossEntropyLoss`. It is $m = \sum_c w_c y_c$ times the loss of the soft labels $w_c y_c / m$: m is the
    sample's weight, and the methods below are those of the normalized labels.

    Attributes:
        class_weights: w, (C,); None: 1.
    """

    class_weights: Float[Tensor, " C"] | None = None
    name = "classification"
    gives_probabilities = True

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

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the cross entropy of each sample."""
        return cross_entropy(outputs, self._labels(outputs, targets), reduction="none")

    def hessian(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C C"]:
        r"""Return $\mathrm{diag}(p) - p p^\top$."""
        S = self.root(outputs, slice(None))
        return S @ S.mT

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

    def probabilities(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Return the softmax of the outputs."""
        return torch.softmax(outputs, dim=-1)


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
