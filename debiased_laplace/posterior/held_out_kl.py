"""Held-out KL of a fitted posterior, of this package or of laplace-torch: checks of its samples, and their terms."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.checks import boolean, integer, number
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating, full_precision
from debiased_laplace.curvature.drawn_rows import RowSampler, Scored
from debiased_laplace.curvature.first_pass import checked_outputs, evaluated, with_target_weights
from debiased_laplace.curvature.hessian_curvature import hessian_traces
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.sharing import first_of_all, loader_of_all, own_part, united
from debiased_laplace.data.source import SampleSource, SampleStream, root_length, sample_source, training_samples
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.held_out_kl import (
    HeldOutKL,
    KLTerms,
    estimate_from_rows,
    estimate_held_out_kl,
    is_all,
    sample_terms,
)
from debiased_laplace.errors import OverlapError
from debiased_laplace.posterior.candidates import Candidate
from debiased_laplace.posterior.drawn_fit import JUDGES, default_rows
from debiased_laplace.posterior.laplace_torch import laplace_torch_candidate, plain_model

_SHARE_THAT_MATTERS = 0.1

_SPREAD = -0x61C8864680B583EB
"""Odd factor that spreads the numbers of rows over all bits."""


@leaves_as_found()
def held_out_kl(
    posterior: Any,
    loader: Any,
    fitted_loader: Any = None,
    *,
    n_data: int | None = None,
    temperature: int | float | None = None,
    n_rows: int | None = None,
    seed: int | None = None,
    progress_bar: bool = False,
) -> HeldOutKL:
    r"""Estimate the distance of a posterior to the full-batch posterior in nats, up to a constant.

    The full-batch posterior has the precision $N \tau H + P_0$, $\tau = 1 / (\sigma^2 T)$, with the prior precision and
    the noise of the given posterior. Posteriors that share weights, parameters, kind of curvature, $P_0$,
    $\sigma$, T and N share the constant, whichever library they come from: the difference of their values is paired by
    sample or row, and is the difference of their KL divergences to the full batch.

    Given all N training samples, rows are drawn of them where the curvature is, independently of every fit: that judges
    any posterior, whatever it was fitted to. Cost: a forward pass over the samples, and a backward pass for each row.
    Given samples left out of the fit: rows of every sample of both loaders, a batch of them in memory at a time.

    Args:
        posterior: one of this package, or a parametric one of laplace-torch 0.3 (diag, kron, full or lowrank; all
            weights, last layer or subnetwork).
        loader: all N training samples, or some of them that were left out of the fit; None only where all N samples
            were fitted.
        fitted_loader: the fitted samples, for the overlap check and for their exact share; required for posteriors of
            laplace-torch, which do not store theirs, unless the loader yields all N samples.
        n_data: N, for a posterior of laplace-torch; None: the number of samples that it was fitted to.
        temperature: T of the full batch, for a posterior of laplace-torch; None: its own. It is required if n_data is
            not the number of fitted samples, because laplace-torch's users set the temperature to n / N to scale the
            curvature of n samples up to N.
        n_rows: expected number of rows drawn of all N samples; None: as many as a default fit draws.
        seed: of that draw; None: the same one for all posteriors.
        progress_bar: show progress.

    Returns:
        The estimate, with its standard error.

    Raises:
        NotFittedError: before `fit`.
        OverlapError: if a sample of the loader was fitted.
        ValueError: if the posterior is a functional one (GP, ELLA, VaLLA), is not at the model's present weights, or
            samples, N and temperature do not belong to it.

    Warns:
        UserWarning: if the fitted samples' share is above a tenth and missing.

    References:
        docs/conventions.md, "Held-out KL"; Daxberger et al. (2021), arXiv 2106.14806.
    """
    boolean(progress_bar, "progress_bar")
    n_data = None if n_data is None else integer(n_data, "n_data", minimum=1)
    temperature = None if temperature is None else number(temperature, "temperature", low=0, is_open=True)
    with torch.inference_mode(False), full_precision():
        candidate = candidate_of(posterior, n_data, temperature)
        with plain_model(candidate.model), candidate.processes.together():
            return estimate_for(candidate, loader, fitted_loader, n_rows=n_rows, seed=seed, progress_bar=progress_bar)


def candidate_of(posterior: Any, n_data: int | None = None, temperature: int | float | None = None) -> Candidate:
    """Return what the held-out KL needs of a posterior, of this package or of laplace-torch.

    Args:
        posterior: fitted.
        n_data: N of the full batch; None: as the posterior has it.
        temperature: of the full batch; None: as the posterior has it.

    Raises:
        NotFittedError: before `fit`.
        ValueError: as `held_out_kl`.
    """
    own = getattr(posterior, "_candidate", None)
    if own is None:
        return laplace_torch_candidate(posterior, n_data, temperature)
    candidate: Candidate = own()
    known = {"n_data": posterior.n_data, "temperature": posterior.temperature}
    for name, given in (("n_data", n_data), ("temperature", temperature)):
        if given is not None and given != known[name]:
            raise ValueError(
                f"This {type(posterior).__name__} has {name}={known[name]}; expected the same or None, got {given!r}; "
                f"{name} is for posteriors of laplace-torch."
            )
    return candidate


def estimate_for(
    candidate: Candidate,
    loader: Any,
    fitted_loader: Any,
    *,
    n_rows: int | None = None,
    seed: int | None = None,
    progress_bar: bool,
) -> HeldOutKL:
    """Estimate the held-out KL of a candidate; see `held_out_kl`. Warnings point at the caller's caller."""
    n_rows = None if n_rows is None else integer(n_rows, "n_rows", minimum=2)
    seed = None if seed is None else integer(seed, "seed", minimum=0)
    n_fitted, n_data, processes = candidate.n_fitted, candidate.target.n_data, candidate.processes
    if processes.several:
        processes.check_same(posterior=candidate.target.context, rows=(n_rows, seed))
        progress_bar = progress_bar and processes.rank == 0
    loader, fitted_loader = (loader_of_all(one, processes, candidate.seed) for one in (loader, fitted_loader))
    asked = n_rows is not None or seed is not None
    if loader is not None and fitted_loader is None and (asked or _yields_all(candidate, loader)):
        return _from_rows(candidate, loader, n_rows, seed or 0, progress_bar=progress_bar)
    if asked:
        raise ValueError("n_rows and seed are of rows drawn of all N samples: expected a loader of them, alone.")
    if candidate.identities is None and fitted_loader is None:
        raise ValueError(
            "Posteriors of laplace-torch do not store their samples: expected the fitted ones as fitted_loader, to "
            "tell them from the held-out ones and for their exact share, or a loader of all the training samples."
        )
    _check_loaders(candidate, loader, fitted_loader)
    if fitted_loader is None and n_fitted > _SHARE_THAT_MATTERS * n_data:
        warnings.warn(
            f"The fitted samples are {n_fitted / n_data:.0%} of the data, and their exact share is "
            "missing: pass fitted_loader for an unbiased estimate.",
            stacklevel=4,
        )
    # both loaders are checked before any row is computed
    given = None if fitted_loader is None else _identify(candidate, fitted_loader)
    held_out = None if loader is None else _identify(candidate, loader)
    if given is not None:
        _check_fitted(candidate, given)
    fitted = candidate.identities if given is None or candidate.identities is not None else given.identities
    if given is not None and held_out is not None and given.is_weighted != held_out.is_weighted:
        raise ValueError("Expected sample_weights from both loaders or from none; got them from one.")
    if held_out is not None and fitted is not None:
        _check_held_out(fitted, held_out, n_data - n_fitted)
    terms = candidate.terms
    outside, keys = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    n_rows = sum(len(known.identities) for known in (given, held_out) if known is not None)
    with tqdm(total=n_rows, disable=not progress_bar, desc="[Held-out KL]") as bar:
        inside = None if given is None else _terms_of(candidate, terms, given, bar)
        if held_out is not None:
            outside = _terms_of(candidate, terms, held_out, bar)
            keys = held_out.identities.positions if held_out.identities.augmented else held_out.identities.hashes
    return estimate_held_out_kl(
        terms,
        outside,
        inside,
        n_data=n_data,
        n_fitted=n_fitted,
        n_held_out=0.0 if held_out is None else held_out.weight,
        sample_keys=keys,
        context=candidate.target.context,
    )


def _yields_all(candidate: Candidate, loader: Any) -> bool:
    """Return whether a loader yields all N samples, by their number or the sum of their weights."""
    samples = training_samples(loader, candidate.seed, candidate.keys)
    if isinstance(samples, SampleStream):
        return True
    likelihood, n_data = candidate.target.likelihood, candidate.target.n_data
    weights = (with_target_weights(batch, likelihood).weights for _, batch in samples.numbered(candidate.seed))
    with undisturbed_randomness(candidate.seed):
        first = next(weights, None)
        if first is None:
            return is_all(len(samples.indices), n_data)
        return is_all(
            float(first.double().sum()) + sum(float(w.double().sum()) for w in weights if w is not None), n_data
        )


def _from_rows(candidate: Candidate, loader: Any, n_rows: int | None, seed: int, *, progress_bar: bool) -> HeldOutKL:
    """Estimate from rows drawn of all N samples."""
    target, processes, device = candidate.target, candidate.processes, candidate.precision.magnitudes.device
    samples = training_samples(loader, candidate.seed, candidate.keys)
    if isinstance(samples, SampleSource):
        samples = united(samples, processes, candidate.seed)
    with (
        evaluating(candidate.model),
        differentiable_kernels(candidate.model),
        undisturbed_randomness(candidate.seed),
    ):
        few, numbered = first_of_all(own_part(samples, processes).numbered(candidate.seed), processes)
        some = few.to(device).weighted(None)
        network = candidate.network(some)
        most = min(processes.gathered("rows", default_rows(network))) if n_rows is None else n_rows
        sampler = RowSampler(network, target.root, some, n_rows=most, seeds=(seed + JUDGES,))
        total = len(samples.indices) if isinstance(samples, SampleSource) else None
        sampler.read(numbered, total=total, progress_bar=progress_bar)
        sampler.merge(processes, by_position=isinstance(samples, SampleSource))
        drawn = sampler.drawn()
        _check_all(candidate, drawn.scored)
        if not len(drawn):
            raise ValueError("No row of these samples has a curvature; expected samples that the model is not sure of.")
        curvature = drawn.curvature(progress_bar=progress_bar)
        with torch.enable_grad():
            sharing, precision = candidate.sharing, candidate.precision
            shares = torch.arange(len(drawn)).chunk(sharing.size)

            def traces_of(own: Tensor) -> Tensor:
                part = curvature.part(own) if sharing.several else curvature
                return part.traces(precision)

            parts = sharing.shared_out(shares, traces_of, device)
            traces = torch.cat(list(parts)).double().cpu() / len(drawn)
    keys = drawn.scored.hashes[drawn.draw.samples] ^ (drawn.draw.rows + 1) * _SPREAD
    return estimate_from_rows(candidate.terms, traces, 1 - drawn.probabilities, row_keys=keys, context=target.context)


def _check_all(candidate: Candidate, scored: Scored) -> None:
    """Check that samples are all N, and that the fitted ones are among them."""
    n_data = candidate.target.n_data
    if not is_all(scored.weight, n_data):
        raise ValueError(
            f"Rows are drawn of all N samples: expected a loader of n_data={n_data:g} samples (or of that sum of "
            f"weights); it yields {scored.weight:g}."
        )
    fitted = candidate.identities
    if fitted is not None and not fitted.augmented:
        n_missing = int((~torch.isin(fitted.hashes, scored.hashes)).sum())
        if n_missing:
            raise ValueError(
                f"Expected a loader of all the training samples; {n_missing} of the {len(fitted)} fitted ones are not "
                "among those that it yields."
            )


@dataclass(frozen=True, eq=False)
class _Identified:
    """Distinct samples of a loader with their identities.

    Attributes:
        samples: the samples, with the weights of their copies included and scaled to a mean of 1.
        identities: of the samples.
        weight: sum of the weights before.
        is_weighted: whether the loader yields weights.
    """

    samples: SubBatch
    identities: SampleIdentities
    weight: float
    is_weighted: bool


def _identify(candidate: Candidate, loader: Any) -> _Identified:
    """Load the samples of a loader once, and identify them."""
    seed = candidate.seed
    source = sample_source(loader, seed, candidate.keys)
    samples = SubBatch(source, source.indices, candidate.precision.magnitudes.device, seed)
    root, positions = source.root()
    augmented = source.augments(seed)
    hashes: list[Tensor] = []
    weights: list[Tensor] = []
    weighs = False
    with undisturbed_randomness(seed):
        for batch in samples:
            hashes.append(sample_hashes(batch))
            batch.check_finite()
            weighted = with_target_weights(batch, candidate.target.likelihood).weights
            weighs = weighs or weighted is not None
            weights.append(torch.ones(len(batch)).double() if weighted is None else weighted.double().cpu())
    identities = SampleIdentities(
        torch.cat(hashes), positions[source.indices], root_length(root, positions), augmented, root
    )
    kept, together = identities.distinct(torch.cat(weights))
    total = float(torch.cat(weights).sum())
    if weighs or not bool(kept.all()):
        if total == 0:
            raise ValueError("Expected a positive weight of at least one sample; got 0 for all of them.")
        samples = samples.at(kept.nonzero().flatten()).weighted(
            (together[kept] / together[kept].mean()).to(candidate.precision.magnitudes.dtype)
        )
    return _Identified(samples, identities.at(kept), total, weighs)


def _terms_of(candidate: Candidate, terms: KLTerms, given: _Identified, bar: Any) -> Tensor:
    """Return the terms of the samples, in the order of their positions."""
    with (
        torch.enable_grad(),
        evaluating(candidate.model),
        differentiable_kernels(candidate.model),
        undisturbed_randomness(candidate.seed),
    ):
        return sample_terms(terms, _curvature_traces(candidate, given.samples, bar))


def _curvature_traces(candidate: Candidate, samples: SubBatch, bar: Any) -> Iterator[Tensor]:
    r"""$\mathrm{tr}(\hat P^{-1} H_n)$ of each sample."""
    precision, root = candidate.precision, candidate.target.root

    def traces(batch: Batch) -> Tensor:
        network = candidate.network(batch)
        found = network.features(batch.inputs)
        if found is None:
            with torch.no_grad():
                outputs = evaluated(network.selection, network.parameters, batch)
        else:
            batch, outputs = replace(batch, features=found[0]), checked_outputs(found[1], batch)
        candidate.target.likelihood.check(outputs, batch.targets)
        if root is None:
            second = SecondDerivatives(network.selection, network.parameters, network.likelihood, batch)
            return hessian_traces(second, batch, precision)
        targets_or_noise = root.targets_or_noise(batch.targets, network.n_outputs, torch.Generator())
        return RowCurvature(network, SubBatch.of(batch), root, targets_or_noise=targets_or_noise).traces(precision)

    for found in candidate.sharing.shared_out(samples, traces, precision.magnitudes.device):
        yield found
        bar.update(len(found))


def _check_loaders(candidate: Candidate, loader: Any, fitted_loader: Any) -> None:
    """Check that there are samples left out of the fit, and that they are given."""
    n_fitted, n_data = candidate.n_fitted, candidate.target.n_data
    all_fitted = is_all(n_fitted, n_data)
    if loader is None and (not all_fitted or fitted_loader is None):
        raise ValueError(
            f"{n_fitted:g} of {n_data} samples were fitted; expected a loader of training samples left out of "
            "the fit. Only a posterior of all the data needs none, and then its fitted_loader."
        )
    if loader is not None and all_fitted:
        hint = ""
        if candidate.identities is None:
            hint = (
                " If they are part of a larger data set, pass its size as n_data, and the temperature of the posterior "
                "of that."
            )
        raise ValueError(
            f"All {n_data} samples were fitted: no sample is left out. Pass a loader of all of them alone, of which "
            f"rows are drawn; or loader=None and fitted_loader, which gives the exact value.{hint}"
        )


def _check_held_out(fitted: SampleIdentities, given: _Identified, n_left_out: float) -> None:
    """Check that no held-out sample was fitted, and that there are not more of them than n_data allows."""
    if n := given.identities.shared_with(fitted):
        raise OverlapError(
            f"{n} of the {len(given.identities)} samples of the loader were fitted. On fitted samples the "
            "held-out KL favours the biased posterior: pass training samples left out of the fit."
        )
    if given.weight > n_left_out * (1 + 1e-6):
        raise ValueError(f"n_data leaves {n_left_out:g} samples out of the fit; the loader yields {given.weight:g}.")


def _check_fitted(candidate: Candidate, given: _Identified) -> None:
    """Check that a loader yields exactly the fitted samples; where they are unknown, as many."""
    expected = candidate.identities
    if expected is None or candidate.are_some:
        if given.weight != candidate.n_fitted:
            raise ValueError(
                f"fitted_loader must yield the {candidate.n_fitted:g} samples that were fitted; it yields "
                f"{given.weight:g}. "
                "laplace-torch counts the whole data set of the loader that it was fitted to, also what a sampler or "
                "drop_last leaves out: fit to a Subset instead."
            )
        if expected is None or given.identities.shared_with(expected) == len(expected):
            return
    ours, theirs = expected.keys(given.identities)
    if not torch.equal(ours.sort().values, theirs.sort().values):
        raise ValueError(
            f"fitted_loader must yield the {len(expected)} samples that were fitted; it yields "
            f"{len(given.identities)}, of which {given.identities.shared_with(expected)} were. They are at "
            "`la.split.direction_indices` and `la.split.magnitude_indices` of the data set."
        )
    if not is_all(given.weight, candidate.n_fitted):
        raise ValueError(
            f"fitted_loader must yield the samples with the weights that they were fitted with: expected a sum of "
            f"{candidate.n_fitted:g}, got {given.weight:g}."
        )
