"""`DebiasedLaplace`, and the class of each subset of weights and structure."""

from typing import Any, Literal

from torch import Tensor, nn

from debiased_laplace.checks import name_of
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace


class DebiasedLowRankLaplace(DebiasedParametricLaplace):
    """All weights, low rank plus diagonal."""

    _key = ("all", "debiased_lowrank")


class DebiasedKronLaplace(DebiasedParametricLaplace):
    """All weights, curvature along the vectors of a Kronecker basis."""

    _key = ("all", "debiased_kron")


class DebiasedFullLaplace(DebiasedParametricLaplace):
    """All weights, all directions; for few parameters."""

    _key = ("all", "debiased_full")


class DebiasedLowRankLLLaplace(DebiasedParametricLaplace):
    """Last layer, low rank plus diagonal."""

    _key = ("last_layer", "debiased_lowrank")


class DebiasedKronLLLaplace(DebiasedParametricLaplace):
    """Last layer, curvature along the vectors of a Kronecker basis."""

    _key = ("last_layer", "debiased_kron")


class DebiasedFullLLLaplace(DebiasedParametricLaplace):
    """Last layer, all directions; for few parameters."""

    _key = ("last_layer", "debiased_full")


class DebiasedLowRankSubnetLaplace(DebiasedParametricLaplace):
    """Some entries of the weights, low rank plus diagonal."""

    _key = ("subnetwork", "debiased_lowrank")


class DebiasedKronSubnetLaplace(DebiasedParametricLaplace):
    """Some entries of the weights, curvature along the vectors of a Kronecker basis."""

    _key = ("subnetwork", "debiased_kron")


class DebiasedFullSubnetLaplace(DebiasedParametricLaplace):
    """Some entries of the weights, all directions; for few parameters."""

    _key = ("subnetwork", "debiased_full")


CLASSES: dict[tuple[str, str], type[DebiasedParametricLaplace]] = {
    (cls._key[0], cls._key[1].removeprefix("debiased_")): cls for cls in DebiasedParametricLaplace.__subclasses__()
}
"""Each class by subset of weights and structure.

`laplace.Laplace(model, likelihood, subset, "debiased_...")` finds them by their `_key`, except for "subnetwork", where
it accepts laplace-torch's own structures only.
"""

_POSITIONAL = ("model", "likelihood", "subset_of_weights", "hessian_structure")


def DebiasedLaplace(
    model: nn.Module,
    likelihood: str | Likelihood,
    subset_of_weights: str = "all",
    hessian_structure: str = "lowrank",
    *,
    rank: int | Literal["auto"] | None = None,
    magnitudes: Literal["held_out", "cross_fitted", "same_batch", "auto"] = "cross_fitted",
    direction_samples: int | float | Literal["auto"] = 0.5,
    magnitude_samples: int | float | None = None,
    n_folds: int = 8,
    complement: Literal["none", "isotropic", "diagonal", "kron", "auto"] | None = None,
    metric: Literal["euclidean", "kron", "auto"] = "euclidean",
    inverse_correction: Literal["none", "second_order"] = "none",
    solver: Literal["auto", "gram", "lanczos"] = "auto",
    seed: int = 0,
    kron_basis: Literal["row_matrices", "kfac"] = "row_matrices",
    kron_magnitudes: Literal["exact", "kronecker"] = "exact",
    kfac_approx: Literal["expand", "reduce"] = "expand",
    sigma_noise: int | float | Tensor | None = None,
    prior_precision: int | float | Tensor = 1.0,
    prior_mean: int | float | Tensor = 0.0,
    temperature: int | float = 1.0,
    enable_backprop: bool = False,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    backend: type | None = None,
    backend_kwargs: dict[str, Any] | None = None,
    last_layer_name: str | None = None,
    subnetwork_indices: Tensor | None = None,
    feature_reduction: str | None = None,
    class_weights: Any = None,
    sampling: Literal["uniform", "curvature"] = "curvature",
    n_rows: int | None = None,
    memory: int | None = None,
    process_group: Any = None,
    directions_dtype: Literal["model", "bfloat16"] = "model",
    directions_device: Literal["model", "cpu", "disk"] = "model",
    shard_directions: bool = False,
) -> DebiasedParametricLaplace:
    """Build a Laplace posterior of a trained network whose curvature is not biased by the samples it is measured on.

    The posterior is a `laplace.ParametricLaplace` and can do everything that laplace-torch's posteriors can.

    Args:
        model: a trained network, inputs (n, …) or a mapping of tensors to outputs (n, C), with positions (n, T, C) or
            (n, C, H, W), or to an output with such logits. It is never written to.
        likelihood: "classification" (outputs are logits), "binary" (one logit, or one for each of several labels),
            "regression", "heteroscedastic" (means of the targets, then their log variances), "poisson" (logarithms of
            rates), "reward_modeling" (pairs (n, 2, …) to fit, with the position of the preferred one as label; single
            inputs to predict), or a `Likelihood` of one's own.
        subset_of_weights: "all": every parameter with `requires_grad`; "last_layer"; "subnetwork": some entries.
        hessian_structure: "lowrank": low rank plus diagonal; "kron": curvature along every vector of a Kronecker basis;
            "full": every direction, for few parameters.
        rank: (lowrank) number of directions; None: every one that the direction samples support, within memory. Here,
            in `magnitudes`, `complement`, `metric` and `direction_samples`, "auto" chooses by held-out KL under the
            present prior when `fit` is called: samples are set aside in turn, and used after all. `choice` says what
            else there was.
        magnitudes: "cross_fitted": every sample gives directions and curvature along them, but never both at once:
            samples are dealt into folds, and each fold is measured along the directions of the others. All samples are
            held at once. "held_out": curvature along the directions from other samples than the directions. Only the
            direction samples are held; the others pass by once, batch by batch, which makes it the one for very many
            curvature samples. "same_batch": both from the same samples, the biased way, for comparison.
        direction_samples: (held_out) samples for the directions, a share of those given to `fit` (drawn rows: of them),
            or with sampling="uniform" a number.
        magnitude_samples: (held_out, sampling="uniform") samples for the magnitudes; None: all the rest. Magnitudes
            that do not split use the samples of both together: with None that is all of them, whatever
            `direction_samples` says.
        n_folds: (cross_fitted) how many folds, or as many as there are samples where these are fewer; other magnitudes
            ignore it.
        complement: (lowrank) curvature outside the directions: "kron": a diagonal in the eigenbasis of the parameters'
            Kronecker factors; "diagonal", along the axes; "isotropic", their mean; or "none", the prior alone. With
            "kron", a prior for every single parameter is refused, and a Hessian is held as a dense matrix. None:
            "kron", or "diagonal" under a prior precision per parameter.
        metric: (lowrank, complement="kron") in which directions lead: "euclidean", or, with sampling="uniform", "kron",
            the metric of the Kronecker estimate, which puts the low rank where a Kronecker diagonal fails most.
        inverse_correction: "second_order" raises the precision along each direction (of a Kronecker posterior, each
            vector of the basis) by what its standard error makes the variance too large; see docs/conventions.md.
        solver: (lowrank) "gram" (all rows at once), "lanczos" (products only) or "auto".
        seed: of the split, of any start vector and of Monte-Carlo draws.
        kron_basis: (kron) eigenvectors of the summed row matrices of each parameter, "row_matrices", or of K-FAC's
            factors, "kfac". Parameters without a basis (norm layers, scalars; with "kfac" all but linear layers and
            convolutions) get the exact diagonal of their curvature.
        kron_magnitudes: (kron) "exact": the curvature of every basis vector, as in EKFAC; "kronecker"
            (sampling="uniform"): products of the factors' own, which are unbiased factor by factor only.
        kfac_approx: (kron_basis="kfac") positions of a sequence or an image as samples of their own, "expand", or
            averaged (inputs) and summed (gradients), "reduce".
        sigma_noise: (regression) standard deviation of the observation noise in units of the targets, one number or one
            per output. None: 1, until `optimize_prior_precision` tunes it with the prior.
        prior_precision: one number, one per parameter tensor, or (neither for hessian_structure="kron" nor for
            complement="kron") one per parameter.
        prior_mean: one number, or one per parameter.
        temperature: of the likelihood.
        enable_backprop: keep the graph of predictions, for gradients with respect to the inputs.
        dict_key_x: of mappings: the tensor whose length is the number of samples.
        dict_key_y: of mappings: the targets, which do not go into the model.
        backend: one of laplace-torch's classes, which picks the curvature (GGN, empirical Fisher or Hessian) and with
            sampling="uniform" computes it where it is right; None: the GGN by torch.func.
        backend_kwargs: {"stochastic": True, "num_samples": m}: the Monte-Carlo GGN with m drawn targets a sample; of
            drawn rows it is the GGN itself.
        last_layer_name: of the module; None: the last one with parameters that a forward pass goes through.
        subnetwork_indices: different positions in the flat vector of the trainable parameters.
        feature_reduction: accepted as by laplace-torch; without effect, since the whole forward pass is differentiated.
        class_weights: (classification) one number for each class, which multiplies the loss of its samples, as the
            `weight` of `torch.nn.CrossEntropyLoss`; N becomes the sum of the samples' weights.
        sampling: "curvature": one forward pass over all samples says where the curvature is, and about `n_rows`
            backward passes go there, each weighted by its inverse probability; `rows` says which. With "held_out",
            `direction_samples` is the share of the rows for the directions. "uniform": all rows of the samples.
        n_rows: expected number of rows; None: all of them, or a number that takes at most a minute or so and fits into
            `memory`. With sampling="uniform", rows of as many random samples as have that many; None: of all.
        memory: bytes, at least 512 MiB, that a fit or a prediction may take beyond the model, the samples and the
            directions. Rows that do not fit into what vectors of P and eigenvectors leave are computed a few parameters
            at a time, again at every use. None: a quarter of what is free for rows, their products and linearized
            batches.
        process_group: of torch.distributed, whose processes share the passes of `fit`; None: the default group where
            one is initialized, else this process alone. All processes call `fit` with the same model and options, and a
            loader over the same data set, of which each may yield a part.
        directions_dtype: (lowrank) "bfloat16" halves the memory of the directions, whose entries are rounded to three
            digits; where the data outweigh the prior ten thousand times, that makes variances too large, with a
            warning. "model": that of the weights.
        directions_device: (lowrank) where the directions are held. From "cpu" (memory), or "disk" (a temporary file, in
            the folder that TMPDIR names), some are taken to the model's device at a time, with the same results.
        shard_directions: (lowrank) each of several processes holds the entries of some parameters, of drawn rows and
            directions. All of them predict together then, with the same inputs; a state is one of these shards.

    Returns:
        The posterior, not fitted yet.

    Raises:
        ValueError: if an option is out of its range; from `fit`, if `memory` does not suffice, with what would.

    Warns:
        UserWarning: if `direction_samples` is given where it has no effect.

    References:
        Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325; Daxberger et al. (2021), arXiv 2106.14806.
    """
    options = {name: value for name, value in locals().items() if name not in _POSITIONAL}
    key = (name_of(subset_of_weights), name_of(hessian_structure))
    if key not in CLASSES:
        subsets, structures = (sorted({k[i] for k in CLASSES}) for i in (0, 1))
        raise ValueError(
            f"Expected subset_of_weights as one of {subsets} and hessian_structure as one of {structures}; "
            f"got {key[0]!r} and {key[1]!r}."
        )
    return CLASSES[key](model, likelihood, **options)
