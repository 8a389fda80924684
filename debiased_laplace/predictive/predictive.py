"""Predictive distribution of a Gaussian over the parameters, linearized or by sampled networks."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from debiased_laplace.checks import integer, shown
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.inputs import Inputs, n_samples_of
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.predictive import linearized, links, sampling
from debiased_laplace.predictive.mean_field import GaussianLogits

PredictionType = Literal["glm", "nn"]
Link = Literal["mean_field", "probit", "mc", "bridge", "bridge_norm"]


_MOST_OUTPUTS = 20_000  # of an input, for each of which a backward pass may be taken


@dataclass(frozen=True, eq=False)
class Predictive:
    """Predictive distribution at a batch of inputs.

    Attributes:
        network: network at the mean.
        inputs: n inputs on the network's device.
        mean: posterior mean of the parameters.
        precision: posterior precision of the parameters.
        create_graph: keep the graph, for gradients with respect to the inputs.
    """

    network: Network
    inputs: Inputs
    mean: Float[Tensor, " P"]
    precision: LowRankPlusDiagonal
    create_graph: bool = False

    @cached_property
    def positions(self) -> torch.Size:
        """Shape of the positions of the outputs."""
        layout = self.network.layout
        assert layout is not None  # for the type checker
        with torch.no_grad():
            return layout.positions_of(self.network.selection.evaluated(self.network.parameters, self.inputs))

    def at_outputs(self, outputs: Any) -> "Predictive":
        """Return the predictive of some outputs, numbered as if those of an input were flattened; None: of all.

        Raises:
            ValueError: if they are no numbers of outputs.
        """
        if outputs is None:
            return self
        layout = self.network.layout
        n_positions = 1 if layout is None else self.positions.numel()
        n = n_positions * self.network.n_classes
        try:
            chosen = torch.as_tensor(outputs, device=self.mean.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Expected outputs as whole numbers; got {shown(outputs)}.") from error
        if chosen.ndim != 1 or len(chosen) == 0 or chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise ValueError(f"Expected outputs as a vector of whole numbers; got {shown(outputs)}.")
        if not -n <= int(chosen.min()) <= int(chosen.max()) < n:
            raise ValueError(
                f"Expected outputs below {n:,}, or negative ones counted from the end; got {shown(outputs)}."
            )
        chosen = chosen.long() % n
        if layout is not None and not layout.is_last:
            # flat outputs have the positions first
            chosen = chosen % n_positions * layout.n_classes + chosen // n_positions
        return replace(self, network=self.network.at_outputs(chosen, len(chosen)))

    def _by_position(self, of_one: "Callable[[Predictive], tuple[Tensor, ...]]") -> tuple[Tensor, ...]:
        """Return what there is for the outputs of each position, (n, T, …), in the layout of the network's outputs.

        Raises:
            ValueError: if there are too many outputs for a backward pass of each.
        """
        layout, T = self.network.layout, self.positions.numel()
        assert layout is not None  # for the type checker
        if T * layout.n_classes > _MOST_OUTPUTS:
            raise ValueError(
                f"Covariances of {T * layout.n_classes:,} outputs of an input take as many backward passes; expected "
                f"at most {_MOST_OUTPUTS:,}, or link_approx='mc' or la.functional_samples, which draw functions."
            )
        parts = [of_one(replace(self, network=self.network.at_position(t))) for t in range(T)]
        stacked = (torch.stack(values, dim=1) for values in zip(*parts, strict=True))
        return tuple(layout.restored(v, self.positions, n_last=v.ndim - 2) for v in stacked)

    def restored(self, flat: Float[Tensor, "*n C"]) -> Tensor:
        """Return flat values of the outputs, (n, C) or (S, n, C), in the layout of the network's outputs."""
        layout = self.network.layout
        if layout is None:
            return flat
        return layout.restored(flat.unflatten(-1, (-1, layout.n_classes)), self.positions, n_lead=flat.ndim - 1)

    def moments(self, *, joint: bool = False, diagonal_output: bool = False) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the linearized outputs; covariances between positions are left out.

        Args:
            joint: whether to return them for all outputs of the batch jointly.
            diagonal_output: whether to return variances in place of covariances between outputs.

        Returns:
            Means (n, C) and covariances (n, C, C) or variances (n, C); jointly (nC,) and (nC, nC).
        """
        if self.network.layout is not None and joint:
            raise ValueError("joint=True is of outputs (n, C); with positions, la.functional_samples draws jointly.")
        if self.network.layout is not None:
            mean, spread = self._by_position(lambda one: one.moments(diagonal_output=diagonal_output))
            return mean, spread
        predict = linearized.predict
        if joint:
            predict = linearized.predict_jointly
        elif diagonal_output:
            predict = linearized.predict_variances
        return predict(self.network, self.precision, self.inputs, create_graph=self.create_graph)

    def gaussian_logits(self) -> GaussianLogits:
        """Return the Gaussian over the logits of each input; of binary labels over (0, f) of each, (n * labels, 2)."""
        if self.network.layout is not None:
            raise ValueError("Logits with positions have no Gaussian here; expected la(x), or la.functional_samples.")
        if self.network.likelihood.name == "binary":
            return GaussianLogits.of_covariance(*_pairs(*self.moments(diagonal_output=True)))
        return linearized.predict_logits(self.network, self.precision, self.inputs, create_graph=self.create_graph)

    def linearized_draws(self, n_samples: int, generator: torch.Generator | None) -> Float[Tensor, "S n C"]:
        """Draw linearized functions and evaluate each at all inputs."""
        return torch.cat(list(self._draws(n_samples, generator)))

    def _draws(self, n_samples: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, "s n C"]]:
        """Yield the same draws in chunks, of which each is kept or reduced by the caller."""
        n_bytes = n_samples_of(self.inputs) * self.network.n_outputs * self.mean.element_size()
        size = max(1, CHUNK_BYTES // max(1, n_bytes))
        for chunk in standard_normal(n_samples, self.mean, generator):
            for deviations in self.precision.root(chunk).split(size):
                yield linearized.draw_functions(self.network, self.inputs, deviations, create_graph=self.create_graph)

    def network_draws(
        self, n_samples: int, generator: torch.Generator | None, model_kwargs: Mapping[str, Any] | None = None
    ) -> Float[Tensor, "S n C"]:
        """Draw parameters, and evaluate the network at each of them."""
        further = dict(model_kwargs or {})
        draw = partial(sampling.network_draws, self.network, self.inputs, create_graph=self.create_graph)
        noise = standard_normal(n_samples, self.mean, generator)
        return torch.cat([draw(self.mean + self.precision.root(chunk), further) for chunk in noise])

    def probabilities(
        self, link: str, n_samples: int, generator: torch.Generator | None, *, diagonal_output: bool = False
    ) -> Float[Tensor, "n ..."]:
        """Return the probabilities of the linearized network's labels by one of the links, as its outputs are."""
        likelihood = self.network.likelihood
        if self.network.layout is not None and link == "mc":
            sums = [likelihood.probabilities(draws).sum(0) for draws in self._draws(n_samples, generator)]
            return self.restored(torch.stack(sums).sum(0) / n_samples)
        if self.network.layout is not None:
            (found,) = self._by_position(
                lambda one: (one.probabilities(link, n_samples, generator, diagonal_output=diagonal_output),)
            )
            return found
        if likelihood.name == "binary":
            return probabilities_of(likelihood, *self.moments(diagonal_output=True), link, n_samples, generator)
        if link == "mean_field" and not diagonal_output:
            return self.gaussian_logits().probabilities()
        independent = link == "probit" or (link in ("mean_field", "mc") and diagonal_output)
        return class_probabilities(*self.moments(diagonal_output=independent), link, n_samples, generator)


def standard_normal(
    n_samples: int, like: Float[Tensor, " P"], generator: torch.Generator | None
) -> Iterator[Float[Tensor, "m P"]]:
    """Draw standard normal vectors with the length, dtype and device of a vector, one per row.

    They come in chunks that bound the memory. On a CPU they are the same numbers as drawn at once.
    """
    P = len(like)
    size = max(1, CHUNK_BYTES // max(1, P * like.element_size()))
    left, ahead = n_samples * P, like.new_empty(0)
    for start in range(0, n_samples, size):
        n = min(size, n_samples - start) * P
        # a CPU draws 16 numbers at a time, and the last 16 once more if their number is no multiple of that
        due = -(-max(n - len(ahead), 0) // 16) * 16
        due = left if left - due < 16 else due
        drawn = torch.randn(due, generator=generator, dtype=like.dtype, device=like.device)
        left -= due
        drawn = torch.cat([ahead, drawn]) if len(ahead) else drawn
        yield drawn[:n].reshape(-1, P)
        ahead = drawn[n:].clone()


def probabilities_of(
    likelihood: Likelihood,
    mean: Float[Tensor, "n C"],
    spread: Tensor,
    link: str,
    n_samples: int,
    generator: torch.Generator | None,
) -> Float[Tensor, "n C"]:
    """Return the probabilities of a likelihood's labels, of Gaussian logits by a link; as `class_probabilities`.

    Raises:
        ValueError: for binary labels by a bridge, which needs a variance of every logit.
    """
    if likelihood.name != "binary":
        return class_probabilities(mean, spread, link, n_samples, generator)
    if link in ("bridge", "bridge_norm"):
        raise ValueError(f"link_approx={link!r} is of a softmax; expected 'mean_field', 'probit' or 'mc' of 'binary'.")
    variance = spread if spread.ndim == 2 else spread.diagonal(dim1=-2, dim2=-1)
    if link == "mc":
        draws = links.independent_draws(mean, variance, n_samples=n_samples, generator=generator)
        return likelihood.probabilities(draws).mean(0)
    return class_probabilities(*_pairs(mean, variance), link, n_samples, generator)[:, 1].reshape(mean.shape)


def _pairs(mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"]) -> tuple[Tensor, Tensor]:
    """Return means (nC, 2) and covariances of the logits (0, f) of every output f: a label is a softmax of two."""
    f, v = mean.flatten(), variance.flatten()
    means = torch.stack([torch.zeros_like(f), f], dim=1)
    return means, torch.diag_embed(torch.stack([torch.zeros_like(v), v], dim=1))


def class_probabilities(
    mean: Float[Tensor, "n C"], spread: Tensor, link: str, n_samples: int, generator: torch.Generator | None
) -> Float[Tensor, "n C"]:
    """Return class probabilities of Gaussian logits by a link.

    Args:
        mean: means of the logits.
        spread: covariances (n, C, C), or variances (n, C) of independent logits.
        link: one of `Link`.
        n_samples: number of draws for "mc".
        generator: random generator of these draws.
    """
    independent = spread.ndim == 2
    if link == "mean_field":
        of_spread = GaussianLogits.of_variances if independent else GaussianLogits.of_covariance
        return of_spread(mean, spread).probabilities()
    if link == "probit":
        return links.probit(mean, spread if independent else spread.diagonal(dim1=-2, dim2=-1))
    if link == "mc":
        draw = links.independent_draws if independent else links.gaussian_draws
        return torch.softmax(draw(mean, spread, n_samples=n_samples, generator=generator), dim=-1).mean(0)
    return links.bridge(mean, spread, normalized=link == "bridge_norm")


def check_draws(n_samples: int, generator: torch.Generator | None, device: torch.device) -> None:
    """Check a number of draws and their generator.

    Raises:
        ValueError: if one of them cannot be used.
    """
    integer(n_samples, "n_samples", minimum=1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"Expected a torch.Generator; got {type(generator).__name__}.")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"Expected a generator on {device}; got one on {generator.device}.")


def check_model_arguments(model: nn.Module, pred_type: str, given: Mapping[str, Any], call: Callable[..., Any]) -> None:
    """Check further arguments of a prediction: only drawn networks take them, and only those of their `forward`.

    Args:
        model: the network.
        pred_type: "glm" or "nn".
        given: further arguments.
        call: the function that predicts, with the arguments that it knows.

    Raises:
        ValueError: for all others, which are slips.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [] if pred_type == "glm" else list(parameters)
    own = [p for p in inspect.signature(call).parameters if p != "model_kwargs"]
    for name in given:
        if name not in known and (pred_type == "glm" or not takes_all or get_close_matches(name, own[1:])):
            meant = "".join(f"; did you mean {match!r}?" for match in get_close_matches(name, own[1:], 1)) or "."
            raise ValueError(
                f"Expected arguments of a prediction, {', '.join(own[2:])}, or with pred_type='nn' of the model's "
                f"forward; got {name!r}{meant}"
            )
