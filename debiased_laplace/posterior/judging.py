"""The held-out KL of a fitted posterior: which samples it may be judged on, and their rows."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.survey import evaluated
from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.samples import Samples
from debiased_laplace.data.source import root_length, sample_source
from debiased_laplace.debiasing.held_out_kl import (
    HeldOutKL,
    KLTerms,
    estimate_held_out_kl,
    sample_terms,
)
from debiased_laplace.errors import OverlapError
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.posterior.predictions import PredictiveInterface

_SHARE_THAT_MATTERS = 0.1
_PANEL = 64  # columns of the covariance's root at once


def held_out_kl(la: PredictiveInterface, loader: Any, fitted_loader: Any) -> HeldOutKL:
    """The held-out KL of a fitted posterior; see `DebiasedLaplace`'s method of that name."""
    fitted = la.fitted
    n_fitted, n_data = fitted.split.n_samples, fitted.split.n_data
    if loader is None and (n_fitted < n_data or fitted_loader is None):
        raise ValueError(
            f"{n_fitted} of {n_data} samples were fitted; expected a loader of training samples left out of "
            "the fit. Only a posterior of all the data needs none, and then its fitted_loader."
        )
    if loader is not None and n_fitted == n_data:
        raise ValueError(
            f"All {n_data} samples were fitted: nothing is left to hold out. Pass loader=None and "
            "fitted_loader, which gives the exact value."
        )
    if fitted_loader is None and n_fitted > _SHARE_THAT_MATTERS * n_data:
        warnings.warn(
            f"The fitted samples are {n_fitted / n_data:.0%} of the data, and their exact share is "
            "missing: pass fitted_loader for an unbiased estimate.",
            stacklevel=3,
        )
    # both loaders are looked at before any row is computed
    given = None if fitted_loader is None else _known(la, fitted_loader)
    held_out = None if loader is None else _known(la, loader)
    if given is not None:
        _check_fitted(fitted.identities, given.identities)
    if held_out is not None:
        _check_held_out(fitted.identities, held_out.identities, n_data - n_fitted)
    operator = la.posterior_precision
    prior = la.prior_precision_diag.detach()
    terms = KLTerms(
        float((operator.covariance_diagonal.double() * prior.double()).sum()),
        float(operator.log_det),
        float(la.n_data * la._H_factor),
    )
    inside = None if given is None else _terms_of(la, terms, given)
    outside, keys = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    if held_out is not None:
        outside = _terms_of(la, terms, held_out)
        keys = held_out.identities.positions if held_out.identities.augmented else held_out.identities.hashes
    return estimate_held_out_kl(
        terms,
        outside,
        inside,
        n_data=n_data,
        n_fitted=n_fitted,
        sample_keys=keys,
        context=_context(la),
    )


@dataclass(frozen=True, eq=False)
class _Known:
    """Samples of a loader, and what they are known by."""

    samples: Samples
    identities: SampleIdentities


def _known(la: PredictiveInterface, loader: Any) -> _Known:
    seed = la.fitted_seed
    source = sample_source(loader, seed, la._problem.keys)
    samples = Samples(source, source.indices, la._center.device, seed)
    root, positions = source.root()
    augmented = source.augments(seed)
    with undisturbed_randomness(seed):
        hashes = torch.cat([sample_hashes(batch) for batch in samples])
    return _Known(
        samples, SampleIdentities(hashes, positions[source.indices], root_length(root, positions), augmented, root)
    )


def _terms_of(la: PredictiveInterface, terms: KLTerms, known: _Known) -> Tensor:
    """Terms of the samples, in the order of their positions."""
    with evaluating(la.model), differentiable_kernels(la.model), undisturbed_randomness(la.fitted_seed):
        return sample_terms(terms, _curvature_traces(la, known.samples))


def _curvature_traces(la: PredictiveInterface, samples: Samples) -> Iterator[Tensor]:
    r"""$\mathrm{tr}(\hat P^{-1} H_n)$ of each sample.

    A Monte-Carlo posterior is judged by the GGN that it estimates: fresh draws would add nothing but noise.
    """
    precision, choice = la.posterior_precision, la._problem.backend
    kind = replace(choice, kind="GGN") if choice.kind == "Monte-Carlo GGN" else choice
    root = kind.root(la._problem.likelihood)
    for batch in samples:
        batch.check_finite()
        network = la.network_for(batch.inputs)
        with torch.no_grad():
            evaluated(network.selection, network.parameters, batch)
        la.check_targets(batch)
        if root is None:
            yield _hessian_traces(network, precision, batch)
            continue
        side = root.side(batch.targets, network.n_outputs, torch.Generator())
        for n, blocks, _ in network.root_rows(batch, root, side):
            yield sum((precision.variance_trace(rows) for rows in blocks), start=precision.directions.new_zeros(n))


def _hessian_traces(network: Network, precision: LowRankPlusDiagonal, batch: Batch) -> Tensor:
    """A Hessian has no rows: the quadratics along every column of a root of the covariance, P of them a sample."""
    second = SecondDerivatives(network.selection, network.parameters, network.likelihood, batch)
    units = torch.eye(network.n_parameters, dtype=network.like.dtype, device=network.like.device)
    panels = [second.quadratics(batch, precision.root(some).T).sum(1) for some in units.split(_PANEL)]
    return torch.stack(panels).sum(0)


def _check_held_out(fitted: SampleIdentities, given: SampleIdentities, n_left_out: int) -> None:
    """The loader of the held-out samples has to yield none that was fitted, and no more than there are."""
    if n := given.shared_with(fitted):
        raise OverlapError(
            f"{n} of the {len(given)} samples of the loader were fitted; on those the held-out KL "
            "prefers the biased posterior. Pass training samples left out of the fit."
        )
    if len(given) > n_left_out:
        raise ValueError(f"n_data leaves {n_left_out} samples out of the fit; the loader yields {len(given)}.")


def _check_fitted(expected: SampleIdentities, given: SampleIdentities) -> None:
    """The loader of the fitted samples has to yield exactly these."""
    ours, theirs = expected.keys(given)
    if not torch.equal(ours.sort().values, theirs.sort().values):
        raise ValueError(
            f"fitted_loader must yield the {len(expected)} samples that were fitted; it yields "
            f"{len(given)}, of which {given.shared_with(expected)} were. They are at "
            "`la.split.direction_indices` and `la.split.magnitude_indices` of the data set."
        )


def _context(la: PredictiveInterface) -> str:
    """What the constant of the KL depends on."""
    prior = la.prior_precision.detach().double().cpu()
    prior = prior[:1] if bool((prior == prior[0]).all()) else prior
    shown = f"{prior.item():.6g}" if prior.numel() == 1 else f"{prior.numel()} entries {hash(tuple(prior.tolist()))}"
    kind = la._problem.backend.kind.removeprefix("Monte-Carlo ")
    selection = la.selection
    over = selection.subset
    if selection.subset != "all weights":
        over = f"{over} {sha256(selection.description.encode()).hexdigest()[:8]}"
    return (
        f"weights {la.weights_fingerprint[:12]}, {over}, {kind}, prior precision {shown}, "
        f"sigma_noise {float(la.sigma_noise):.6g}, temperature {la.temperature:.6g}, n_data {la.n_data}"
    )
