"""Predictions of targets: mean and standard deviation with the observation noise, or probabilities of labels."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.checks import integer
from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.predictive.predictive import Predictive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR = "#0072B2"


@dataclass(frozen=True, eq=False)
class Draws:
    """Source of functions drawn from a posterior, as it was when the prediction was made.

    Attributes:
        predictive: at the inputs of the prediction.
        pred_type: "glm" or "nn".
    """

    predictive: Predictive
    pred_type: str

    def functions(self, n_samples: int, generator: torch.Generator | None) -> Float[Tensor, "S n C"]:
        """Draw functions, each at all inputs, with flat outputs.

        Raises:
            ValueError: if the number is no positive integer.
        """
        n_samples = integer(n_samples, "n_samples", minimum=1)
        model = self.predictive.network.selection.model
        draw = self.predictive.network_draws if self.pred_type == "nn" else self.predictive.linearized_draws
        with torch.inference_mode(False), evaluating(model), differentiable_kernels(model):
            return draw(n_samples, generator)


@dataclass(frozen=True, eq=False, repr=False)
class RegressionPrediction:
    """Gaussian prediction of the targets of a regression, in the shape that they had in `fit`, (n, C) or (n,).

    Attributes:
        mean: of the targets.
        std: standard deviation of the targets: of the function and of the observation noise together.
        function_std: standard deviation of the function alone.
        noise: standard deviation of the observation noise, one number or one per output; 0 for a reward.
        draws: source of `samples`.
    """

    mean: Tensor
    std: Tensor
    function_std: Tensor
    noise: Tensor
    draws: Draws

    @classmethod
    def of(
        cls, mean: Float[Tensor, "n ..."], variance: Float[Tensor, "n ..."], noise: Tensor, draws: Draws, *, flat: bool
    ) -> "RegressionPrediction":
        """Return the prediction of outputs with a mean, a function variance and observation noise.

        Args:
            mean: of the outputs.
            variance: of the function; tiny negative values, which are rounding, count as 0.
            noise: standard deviation, one number or (C,).
            draws: source of functions.
            flat: whether targets are (n,), or with positions one for each of them.
        """
        deviation = variance.clamp_min(0).sqrt()
        total = torch.hypot(deviation, noise.expand_as(deviation))
        if flat:
            # of images, the classes come before the positions
            axis = 1 if mean.ndim > 3 else -1
            mean, total, deviation = (x.select(axis, 0) for x in (mean, total, deviation))
        return cls(mean, total, deviation, noise, draws)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return lower and upper ends of the central intervals that hold a target with a probability.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        half = _quantile(level) * self.std
        return self.mean - half, self.mean + half

    def samples(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets, (n_samples, *shape of the mean): functions at all inputs together, and noise at each.

        Args:
            n_samples: number of draws.
            generator: of the draws, on the model's device.
        """
        f = self.draws.predictive.restored(self.draws.functions(n_samples, generator))
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device) * self.noise
        return (f + noise).reshape(n_samples, *self.mean.shape)

    def plot(self, targets: Tensor | None = None, *, level: float = 0.95, axes: "Axes | None" = None) -> "Axes":
        """Plot a regression of one input and one output: mean, interval of the function, interval of the targets.

        Args:
            targets: targets at the same inputs, shown as points.
            level: probability of both intervals.
            axes: of matplotlib; None: the current ones.

        Returns:
            The axes.

        Raises:
            ValueError: if there are several inputs or outputs, or targets of another length.
        """
        x, mean, std, function_std = self._columns()
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.gca()
        order, z = x.argsort(), _quantile(level)
        for spread, alpha, label in ((std, 0.15, f"{level:.0%} of the targets"), (function_std, 0.35, "function")):
            low, high = ((mean + sign * z * spread)[order].tolist() for sign in (-1, 1))
            axes.fill_between(x[order].tolist(), low, high, color=_COLOUR, alpha=alpha, lw=0, label=label)
        axes.plot(x[order].tolist(), mean[order].tolist(), color=_COLOUR, label="mean")
        if targets is not None:
            if targets.numel() != len(x):
                raise ValueError(f"Expected a target for each of {len(x)} inputs; got shape {tuple(targets.shape)}.")
            axes.plot(x.tolist(), targets.detach().reshape(-1).tolist(), "k.", ms=4, label="data")
        axes.legend(frameon=False)
        return axes

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the inputs and the prediction as vectors on the CPU."""
        inputs, n = self.draws.predictive.inputs, len(self.mean)
        if not isinstance(inputs, Tensor) or inputs.numel() != n or self.mean.numel() != n:
            got = tuple(inputs.shape) if isinstance(inputs, Tensor) else "a mapping"
            raise ValueError(
                "A plot needs inputs of shape (n,) or (n, 1), and one output; got inputs "
                f"{got} and predictions {tuple(self.mean.shape)}."
            )
        x, mean, std, function_std = (
            t.detach().cpu().reshape(-1).double() for t in (inputs, self.mean, self.std, self.function_std)
        )
        return x, mean, std, function_std

    def __repr__(self) -> str:
        low, high = (float(t) for t in self.std.detach().aminmax())
        return f"RegressionPrediction(mean and std of shape {tuple(self.mean.shape)}, std from {low:.3g} to {high:.3g})"


@dataclass(frozen=True, eq=False, repr=False)
class TargetPrediction:
    """Prediction of targets whose noise depends on the outputs, in the shape that they had in `fit`.

    Attributes:
        mean: of the targets.
        std: standard deviation of the targets; its square is the sum of those of the two following.
        function_std: standard deviation of the targets' mean, which is not known (epistemic).
        noise_std: root of the mean variance that targets have around it (aleatoric).
        outputs: means (n, C) and variances (n, C) of the outputs; with positions (n, *positions, C).
        likelihood: of the targets.
        draws: source of `samples`.
        last: what becomes of the last dimension of targets: "kept", "dropped" where there is one of each, or put
            "first", before the positions.
    """

    mean: Tensor
    std: Tensor
    function_std: Tensor
    noise_std: Tensor
    outputs: tuple[Tensor, Tensor]
    likelihood: Likelihood
    draws: Draws
    last: Literal["kept", "dropped", "first"]

    @classmethod
    def of(
        cls,
        mean: Float[Tensor, "n *_"],
        variance: Float[Tensor, "n *_"],
        likelihood: Likelihood,
        draws: Draws,
        *,
        flat: bool,
    ) -> "TargetPrediction":
        """Return the prediction of Gaussian outputs.

        Args:
            mean: of the outputs, (n, C), (n, T, C) or (n, C, H, W).
            variance: of the outputs; tiny negative values, which are rounding, count as 0.
            likelihood: of the targets.
            draws: source of functions.
            flat: whether targets are (n,), or with positions one for each of them.
        """
        axis = 1 if mean.ndim > 3 else -1
        outputs = mean.movedim(axis, -1), variance.movedim(axis, -1).clamp_min(0)
        rows = (x.reshape(-1, x.shape[-1]) for x in outputs)
        moments = [m.reshape(*outputs[0].shape[:-1], -1) for m in likelihood.target_moments(*rows)]
        last: Literal["kept", "dropped", "first"] = "kept" if axis == -1 else "first"
        last = "dropped" if flat and moments[0].shape[-1] == 1 else last
        mean, of_mean, of_noise = (_placed(m, last) for m in moments)
        return cls(mean, (of_mean + of_noise).sqrt(), of_mean.sqrt(), of_noise.sqrt(), outputs, likelihood, draws, last)

    def interval(self, level: float = 0.95, n_samples: int = 2_000) -> tuple[Tensor, Tensor]:
        """Return lower and upper ends of central intervals that hold a target with a probability: quantiles of draws.

        Args:
            level: the probability.
            n_samples: number of draws of each target, the same at every call.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        _quantile(level)
        n_samples = integer(n_samples, "n_samples", minimum=2)
        mean, variance = (x.detach() for x in self.outputs)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(n_samples, *mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        y = self._drawn(mean + variance.sqrt() * z, generator)
        tails = y.new_tensor([(1 - level) / 2, (1 + level) / 2])
        # of counts, a value that was drawn
        low, high = torch.quantile(y, tails, dim=0, interpolation="nearest")
        return low, high

    def samples(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets, (n_samples, *shape of the mean): functions at all inputs together, and noise at each.

        Args:
            n_samples: number of draws.
            generator: of the functions, on the model's device.
        """
        f = self.draws.functions(n_samples, generator)
        seed = int(torch.randint(2**62, (), generator=generator, device=f.device if generator else None))
        return self._drawn(f, torch.Generator().manual_seed(seed))

    def _drawn(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets at outputs (S, n, C), (S, n, T, C) or flat ones."""
        *of_inputs, C = self.outputs[0].shape
        y = self.likelihood.targets_at(f.reshape(len(f), -1, C), generator).to(f.dtype)
        return _placed(y.reshape(len(f), *of_inputs, -1), self.last, n_lead=2)

    def __repr__(self) -> str:
        low, high = (float(t) for t in self.std.detach().aminmax())
        shape = tuple(self.mean.shape)
        return (
            f"TargetPrediction({self.likelihood.name}, mean and std of shape {shape}, std from {low:.3g} to {high:.3g})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ClassificationPrediction:
    """Prediction of labels.

    Attributes:
        probs: class probabilities, averaged over the posterior; of "binary" those of every label.
        draws: source of `samples`.
    """

    probs: Float[Tensor, "n ..."]
    draws: Draws

    def samples(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S n ..."]:
        """Draw functions, and return the probabilities of each.

        Args:
            n_samples: number of draws.
            generator: of the draws, on the model's device.
        """
        predictive = self.draws.predictive
        probabilities = predictive.network.likelihood.probabilities(self.draws.functions(n_samples, generator))
        return predictive.restored(probabilities)

    def __repr__(self) -> str:
        # of sequences, labels are the last dimension
        of_labels = -1 if self.probs.ndim == 3 else 1
        low, high = (float(t) for t in self.probs.detach().amax(of_labels).aminmax())
        shape = tuple(self.probs.shape)
        return f"ClassificationPrediction(probs of shape {shape}, the largest from {low:.3g} to {high:.3g})"


def _placed(targets: Tensor, last: str, *, n_lead: int = 1) -> Tensor:
    """Return targets (…, T), with a number of leading dimensions, as `TargetPrediction.last` says."""
    if last == "dropped":
        return targets[..., 0]
    return targets.movedim(-1, n_lead) if last == "first" else targets


def _quantile(level: float) -> float:
    """Return the standard normal quantile at the upper end of a central interval."""
    if isinstance(level, bool) or not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")
    return NormalDist().inv_cdf((1 + float(level)) / 2)
