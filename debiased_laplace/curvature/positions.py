r"""Outputs at the positions of a sample: tokens of a sequence, pixels of an image.

A network may return (n, T, C), classes last, or (n, C, H, W) with any number of dimensions of positions after the
classes, as torch's losses take them. Elsewhere in the package such outputs are flat, (n, T C), position by position;
the likelihood of a sample is the product over its positions, and $\Lambda$ is block-diagonal.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from debiased_laplace.curvature.likelihood import Likelihood

IGNORED = -100
"""Label of positions that do not count, as in `torch.nn.CrossEntropyLoss`."""


def flattened(outputs: Tensor) -> Float[Tensor, "n TC"]:
    """Return outputs (n, C), (n, T, C) or (n, C, H, W, …) as (n, T C), position by position."""
    if outputs.ndim <= 2:
        return outputs
    return (outputs if outputs.ndim == 3 else outputs.movedim(1, -1)).flatten(1)


def that_count(targets: Tensor, *, n_lead: int) -> Bool[Tensor, "*n"]:
    """Return which positions count: all but those whose label is -100.

    Args:
        targets: one for each position, or with further dimensions.
        n_lead: number of dimensions of the positions.
    """
    is_label = not targets.is_floating_point() and targets.ndim == n_lead
    if is_label:
        return targets != IGNORED
    return torch.ones(targets.shape[:n_lead], dtype=torch.bool, device=targets.device)


@dataclass(frozen=True)
class OutputLayout:
    """Layout of a network's outputs with positions.

    Attributes:
        n_classes: number C of outputs at a position.
        n_dimensions: of the positions: 1 for (n, T, C), 2 for (n, C, H, W).
        sizes: of these dimensions in the first batch, with which targets are compared; None: not known.
    """

    n_classes: int
    n_dimensions: int
    sizes: tuple[int, ...] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, outputs: Tensor) -> "OutputLayout | None":
        """Return the layout of outputs; None without positions."""
        if outputs.ndim <= 2:
            return None
        if outputs.ndim == 3:
            return cls(outputs.shape[2], 1, tuple(outputs.shape[1:2]))
        return cls(outputs.shape[1], outputs.ndim - 2, tuple(outputs.shape[2:]))

    def __str__(self) -> str:
        places = ("T",) if self.is_last else tuple("DHW"[-min(3, self.n_dimensions) :])
        places = ("…", *places) if self.n_dimensions > 3 else places
        dimensions = (*places, str(self.n_classes)) if self.is_last else (str(self.n_classes), *places)
        return f"(n, {', '.join(dimensions)})"

    @property
    def is_last(self) -> bool:
        """Whether classes are the last dimension."""
        return self.n_dimensions == 1

    def restored(self, values: Tensor, shape: torch.Size, *, n_lead: int = 1, n_last: int = 1) -> Tensor:
        """Return values by position in the dimensions that the network's outputs have.

        Args:
            values: (…, T, *last): leading dimensions, all positions in one, and what there is for each.
            shape: of the positions.
            n_lead: number of leading dimensions.
            n_last: number of dimensions after the position, which the outputs have instead of their classes.
        """
        found = values.unflatten(n_lead, shape)
        if self.is_last or n_last == 0:
            return found
        ends = range(-n_last, 0)
        return found.movedim(tuple(ends), tuple(range(n_lead, n_lead + n_last)))

    def rows_of(self, values: Tensor, n_last: int = 1, *, n_lead: int = 0) -> Tensor:
        """Return values in the layout of the network's outputs, or targets, as rows: one for each position of a sample.

        Args:
            values: (…, n, positions, *last), or with the last dimensions before the positions.
            n_last: number of dimensions that values have instead of the classes.
            n_lead: number of dimensions before that of the samples.
        """
        if not self.is_last and n_last:
            values = values.movedim(tuple(range(n_lead + 1, n_lead + 1 + n_last)), tuple(range(-n_last, 0)))
        return values.flatten(n_lead, n_lead + self.n_dimensions)

    def positions_of(self, outputs: Tensor) -> torch.Size:
        """Return the shape of the positions of a network's outputs."""
        return outputs.shape[1:2] if self.is_last else outputs.shape[2:]


@dataclass(frozen=True, eq=False)
class PositionWise(Likelihood):
    """Product of a likelihood over the positions of a sample.

    Labels of -100 do not count.

    Attributes:
        base: likelihood of the outputs of a position.
        layout: of the outputs.
    """

    base: Likelihood
    layout: OutputLayout

    @classmethod
    def of(cls, likelihood: Likelihood, layout: OutputLayout | None) -> Likelihood:
        """Return the likelihood of a network's outputs; the likelihood itself without positions."""
        base = likelihood.base if isinstance(likelihood, PositionWise) else likelihood
        return base if layout is None else cls(base, layout)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the likelihood of a position."""
        return self.base.name

    @property
    def gives_probabilities(self) -> bool:  # type: ignore[override]
        """Whether predictions are probabilities of labels."""
        return self.base.gives_probabilities

    @property
    def class_weights(self) -> Tensor | None:
        """Class weights of the likelihood of a position."""
        return getattr(self.base, "class_weights", None)

    @property
    def relative_noise(self) -> tuple[float, ...] | None:
        """Relative noise of the outputs of a position."""
        return getattr(self.base, "relative_noise", None)

    def by_position(self, outputs: Float[Tensor, "*n TC"]) -> Float[Tensor, "*n T C"]:
        """Return flat outputs by position."""
        return outputs.unflatten(-1, (-1, self.layout.n_classes))

    def targets_by_position(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return targets by position, (…, T) or (…, T, …), those of one sample or of a batch as the outputs are."""
        n_lead = outputs.ndim - 1
        has_classes = targets.ndim - n_lead > self.layout.n_dimensions
        y = targets.movedim(n_lead, -1) if has_classes and not self.layout.is_last else targets
        return y.flatten(n_lead, n_lead + self.layout.n_dimensions - 1)

    def by_position_of(self, values: Tensor) -> Tensor:
        """Return predictions by position, (n, T, …), given flat or as the network's outputs are."""
        if values.ndim == 2:
            return self.by_position(values)
        rows = self.layout.rows_of(values, values.ndim - 1 - self.layout.n_dimensions)
        return rows.unflatten(0, (len(values), -1))

    def counted_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return targets by position, with a valid label where a position does not count."""
        return self._counted(self.targets_by_position(outputs, targets))

    def factors(self, outputs: Float[Tensor, "n TC"], targets: Tensor) -> Float[Tensor, "n T"]:
        """Return the factor of each position's loss: 0 where it does not count."""
        y = self.targets_by_position(outputs, targets)
        n, T = y.shape[:2]
        own = self.base.weights(self._counted(y).flatten(0, 1))
        factors = that_count(y, n_lead=2).to(outputs.dtype)
        return factors if own is None else factors * own.to(factors).view(n, T)

    def check(self, outputs: Float[Tensor, "n TC"], targets: Tensor) -> None:
        """Check that there is a target for each position, and that those that count fit the outputs."""
        n, C, d = len(outputs), self.layout.n_classes, self.layout.n_dimensions
        T = outputs.shape[1] // C
        shape = targets.shape[1 : 1 + d] if targets.ndim <= 1 + d or self.layout.is_last else targets.shape[2:]
        sizes = self.layout.sizes
        # other batches may have other sizes, whose number of positions is all that flat outputs tell
        transposed = d > 1 and sizes is not None and math.prod(sizes) == T and tuple(shape) != sizes
        if targets.ndim < 1 + d or shape.numel() != T or transposed:
            expected = f"({n}, {T}) for outputs ({n}, {T}, {C}), classes last"
            if d > 1:
                of_positions = ", ".join(map(str, sizes)) if sizes is not None and math.prod(sizes) == T else "…"
                expected = f"({n}, {of_positions}) for outputs ({n}, {C}, {of_positions})"
            way_out = ""
            if d == 1 and targets.ndim == 2 and targets.shape[1] == C:
                way_out = (
                    ". Of outputs (n, T, C) the classes are the last dimension: return outputs.mT from the model if "
                    f"it returns (n, C, T) = ({n}, {T}, {C})"
                )
            raise ValueError(f"Expected targets of shape {expected}; got shape {tuple(targets.shape)}{way_out}.")
        y = self.targets_by_position(outputs, targets).flatten(0, 1)
        f = self.by_position(outputs).flatten(0, 1)
        stay = that_count(y, n_lead=1)
        if bool(stay.any()):
            self.base.check(f[stay.to(f.device)], y[stay])

    def per_sample_loss(self, outputs: Float[Tensor, "n TC"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the sum of the losses of each sample's positions."""
        y = self.counted_targets(outputs, targets)
        f = self.by_position(outputs)
        losses = self.base.per_sample_loss(f.flatten(0, 1), y.flatten(0, 1)).view(f.shape[:2])
        return (losses * self.factors(outputs, targets)).sum(1)

    def gradient(self, outputs: Float[Tensor, "*n TC"], targets: Tensor) -> Float[Tensor, "*n TC"]:
        r"""Return $\partial \ell / \partial f$."""
        if outputs.ndim == 1:
            return self.gradient(outputs[None], targets[None])[0]
        y = self.counted_targets(outputs, targets)
        found = self.base.gradient(self.by_position(outputs), y)
        return (found * self.factors(outputs, targets)[..., None]).flatten(-2)

    def output_factors(self, outputs_per_sample: int, targets: Tensor) -> Float[Tensor, "n TC"]:
        """Return the factor of each output's curvature."""
        like = torch.empty(len(targets), outputs_per_sample, device=targets.device)
        return self.factors(like, targets).repeat_interleave(self.layout.n_classes, dim=1)

    def hessian(self, outputs: Float[Tensor, "*n TC"]) -> Float[Tensor, "*n TC TC"]:
        r"""Return $\Lambda$ where all positions count."""
        return _block_diagonal(self.base.hessian(self.by_position(outputs)))

    def root(self, outputs: Float[Tensor, "*n TC"], columns: slice) -> Float[Tensor, "*n TC r"]:
        r"""Return columns of $S$ where all positions count."""
        C, n_outputs = self.layout.n_classes, outputs.shape[-1]
        start, stop, _ = columns.indices(n_outputs)
        # positions that the columns belong to
        first, last = start // C, max(-(-stop // C), start // C)
        blocks = self.base.root(self.by_position(outputs)[..., first:last, :], slice(None))
        own = _block_diagonal(blocks)[..., start - first * C : max(stop, start) - first * C]
        return pad(own, (0, 0, first * C, n_outputs - last * C))

    def root_transposed(self, outputs: Float[Tensor, "*n TC"], X: Float[Tensor, "*n TC k"]) -> Float[Tensor, "*n TC k"]:
        r"""Return $S^\top X$ where all positions count."""
        parts = X.unflatten(-2, (-1, self.layout.n_classes))
        return self.base.root_transposed(self.by_position(outputs), parts).flatten(-3, -2)

    def hessian_product(self, outputs: Float[Tensor, "*n TC"], x: Float[Tensor, "*n TC"]) -> Float[Tensor, "*n TC"]:
        r"""Return $\Lambda x$ where all positions count."""
        return self.base.hessian_product(self.by_position(outputs), self.by_position(x)).flatten(-2)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:  # noqa: ARG002
        """Raise, because draws of targets do not know which positions count."""
        raise ValueError("Monte-Carlo curvatures of outputs with positions are not built; expected stochastic=False.")

    def probabilities(self, outputs: Float[Tensor, "*n TC"]) -> Float[Tensor, "*n TC"]:
        """Return the probabilities of the labels of every position, flat."""
        return self.base.probabilities(self.by_position(outputs)).flatten(-2)

    def _counted(self, targets: Tensor) -> Tensor:
        """Return targets with a valid label where a position does not count."""
        return targets if targets.is_floating_point() else targets.masked_fill(targets == IGNORED, 0)


def _block_diagonal(blocks: Float[Tensor, "*n T C C"]) -> Float[Tensor, "*n TC TC"]:
    T = blocks.shape[-3]
    unit = torch.eye(T, dtype=blocks.dtype, device=blocks.device)
    whole = unit[:, None, :, None] * blocks[..., :, :, None, :]
    return whole.flatten(-4, -3).flatten(-2)
