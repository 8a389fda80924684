"""`evaluate`: from posteriors and a loader to a report, in one pass."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from laplace.baselaplace import BaseLaplace
from torch import nn
from torch.utils.data import RandomSampler

from debiased_laplace.calibration.build import calibration_report
from debiased_laplace.calibration.check import ThresholdSource
from debiased_laplace.calibration.contents import PredictionRecord, ReportFigure, ReportTable, Task
from debiased_laplace.calibration.inputs import Settings, as_tensor
from debiased_laplace.calibration.labels import tabulate_labels
from debiased_laplace.calibration.methods import (
    BatchPrediction,
    Method,
    PredictionOptions,
    PredictionType,
    network_of,
)
from debiased_laplace.calibration.posteriors import compare_held_out, summarize_posteriors
from debiased_laplace.calibration.predict import (
    Collected,
    as_prediction,
    check_loader,
    collect,
    in_training_mode,
    infer_task,
    read_methods,
)
from debiased_laplace.calibration.probabilities import draw_rows
from debiased_laplace.calibration.report import CalibrationReport
from debiased_laplace.calibration.scaling import TemperatureScaling
from debiased_laplace.checks import boolean, name_of, shown, text
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.positions import OutputLayout
from debiased_laplace.data.inputs import DEFAULT_KEYS, MappingKeys
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace
from debiased_laplace.predictive.predictive import Link
from debiased_laplace.processes import Processes

FEW_DRAWS = 100


@leaves_as_found()
def evaluate(  # noqa: D417 - further options are those of the report
    posteriors: Mapping[str, Method] | BaseLaplace,
    loader: Iterable[Any],
    *,
    task: Task | None = None,
    baseline: str | None = None,
    include_map: bool | None = None,
    pred_type: PredictionType = "glm",
    link_approx: Link | None = None,
    n_samples: int = 100,
    sigma_noise: Any = None,
    ood_loaders: Mapping[str, Iterable[Any]] | None = None,
    validation_loader: Iterable[Any] | None = None,
    held_out_loader: Iterable[Any] | None = None,
    fitted_loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    dict_key_x: str | None = None,
    dict_key_y: str | None = None,
    seed: int = 0,
    progress_bar: bool = False,
    n_bins: int = 15,
    confidence_level: float = 0.95,
    n_resamples: int = 1000,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    description: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tables: Sequence[ReportTable] = (),
    figures: Sequence[ReportFigure] = (),
    target_unit: str | None = None,
    temperature_scaling: TemperatureScaling = "auto",
    clusters: Any = None,
    max_samples: int = 1_000_000,
    thresholds: ThresholdSource | None = None,
) -> CalibrationReport:
    """Predict a test set with several methods in one pass over its loader, and compare their calibration in a report.

    All methods get the same inputs, whatever the loader shuffles or augments, and the same random numbers, which start
    anew with every batch, so that sampled networks are the same for all batches. The models and the global random state
    are left as they were. Memory: predictions on the CPU in their own dtype; samples of one batch at a time, but
    of counts and of predicted noise `n_samples` numbers for every output of the test set.

    `n_bins` and all that follows are options of `calibration_report`; `clusters` is in the order of the loader,
    `temperature_scaling` is fitted on `validation_loader` where it is given, and `class_names` are the names of several
    binary labels, which a table shows one by one.

    Args:
        posteriors: name to method. A Laplace posterior of this package or of laplace-torch; a network, which is the
            MAP estimate: its outputs are those of the posteriors' likelihood; any callable that maps a batch of inputs
            to probabilities (n, C), to (mean, standard deviation) with the observation noise, or to samples (S, n, C),
            in regression of the function alone, of counts of the rates, with its networks in evaluation mode. One
            posterior alone is called "laplace".
        loader: the test set, an iterable of batches: (inputs, targets), or mappings of tensors. Where outputs have
            positions or several binary labels, each of them is a row of the report, and those of a sample a cluster.
        task: "binary", "multiclass" or "regression"; None: that of the first Laplace posterior, "multiclass" for every
            kind of classification.
        baseline: name of the method that the others are compared with; default: the first.
        include_map: whether the network of the first Laplace posterior is added, first and under the name "map"; None:
            where no network and no "map" is given, and no other baseline.
        pred_type: of Laplace posteriors: "glm", the linearized network, or "nn", networks at drawn weights.
        link_approx: of Laplace posteriors of either library in classification: "mean_field", "probit", "mc" (the mean
            over `predictive_samples`), "bridge" or "bridge_norm"; None: "mean_field" for "glm", "mc" for "nn". For
            another link give a callable, `lambda x: la(x)`.
        n_samples: draws where Laplace posteriors predict by drawing, at least 2; below 100 the report warns.
        sigma_noise: standard deviation of the observation noise, for networks and sampling callables in regression;
            None: that of the first Laplace posterior. A Laplace posterior uses its own.
        ood_loaders: name to a loader of inputs out of distribution; targets are ignored.
        validation_loader: labelled samples outside of training and test set, for temperature scaling of the baseline.
        held_out_loader: training samples left out of every fit, to compare the posteriors by their `held_out_kl`.
        fitted_loader: the samples that were fitted, of all posteriors or by name; those of laplace-torch need it.
        dict_key_x: of mappings: the tensor whose length is the number of samples; None: as the first posterior.
        dict_key_y: of mappings: the targets; None: as the first posterior.
        seed: of everything that is drawn.
        progress_bar: show progress.

    Returns:
        The report, with a section on the posteriors and on how each method predicted.

    Raises:
        NotFittedError: if a posterior is not fitted.
        OverlapError: if a held-out sample was fitted.
        ValueError: for other wrong methods, batches or options, and for clusters with a loader that shuffles.

    Warns:
        UserWarning: if a callable evaluates a network in training mode.

    References:
        Daxberger et al. (2021), arXiv 2106.14806 (predictives); docs/calibration_reports.md.
    """
    settings = Settings(n_bins, confidence_level, n_resamples, seed)
    for name, source in (
        ("loader", loader),
        ("validation_loader", validation_loader),
        ("held_out_loader", held_out_loader),
    ):
        if source is not None or name == "loader":
            check_loader(source, name)
    boolean(progress_bar, "progress_bar")
    if include_map is not None:
        boolean(include_map, "include_map")
    for name, key in (("dict_key_x", dict_key_x), ("dict_key_y", dict_key_y)):
        if key is not None:
            text(key, name)
    if clusters is not None and isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError("clusters are in the order of the loader, which shuffles; expected shuffle=False.")
    if ood_loaders is not None and not isinstance(ood_loaders, Mapping):
        raise ValueError(f"ood_loaders must map names of sets to loaders; got {type(ood_loaders).__name__}.")
    methods = read_methods(posteriors, baseline, include_map)
    first = next(iter(methods)) if baseline is None else baseline
    if not isinstance(first, str):
        raise ValueError(f"baseline must be one of {', '.join(map(repr, methods))}; got {shown(first)}.")
    laplace = {name: m for name, m in methods.items() if isinstance(m, BaseLaplace)}
    for name, source in (ood_loaders or {}).items():
        check_loader(source, f"ood_loaders[{name!r}]")
    for name, source in fitted_loader.items() if isinstance(fitted_loader, Mapping) else [("", fitted_loader)]:
        if source is not None:
            check_loader(source, f"fitted_loader[{name!r}]" if name else "fitted_loader")
    task = infer_task(laplace) if task is None else task
    known: Any = next(iter(laplace.values()), DEFAULT_KEYS)
    keys = MappingKeys(dict_key_x or known.dict_key_x, dict_key_y or known.dict_key_y)
    noise = known.sigma_noise.detach() if sigma_noise is None and laplace else sigma_noise

    def likelihood_of(model: nn.Module | None) -> str:
        own = [m for m in laplace.values() if network_of(m) is model] or laplace.values()
        names = {name_of(m.likelihood) for m in own}
        return names.pop() if len(names) == 1 else ""

    layout, n_labels = _rows_of(laplace.values())
    options = PredictionOptions(
        task,
        pred_type,
        link_approx,
        n_samples,
        settings.seed,
        keys,
        progress_bar,
        likelihood_of=likelihood_of,
        layout=layout,
        n_labels=n_labels,
    )

    def read(found: Mapping[str, BatchPrediction]) -> dict[str, Any]:
        return {n: as_prediction(n, p, laplace[n].sigma_noise if n in laplace else noise) for n, p in found.items()}

    processes = _processes_of(laplace.values())
    if processes.several:
        priors = {name: torch.as_tensor(la.prior_precision).sum().item() for name, la in laplace.items()}
        own = (list(methods), task, pred_type, link_approx, n_samples, settings)
        processes.check_same(prior_precision=priors, options_of_evaluate=own)

    def predicted(some: Mapping[str, Method], of: Iterable[Any], what: str, *, labelled: bool = True) -> Collected:
        with processes.together():
            return collect(some, of, options, what, labelled=labelled, processes=processes)

    test = predicted(methods, loader, "the test set")
    if test.samples is not None:
        # positions and labels of a sample are not independent
        if len(test.samples) == 0:
            raise ValueError("Expected positions that count; the labels of all of them are -100.")
        n = test.n_samples
        ids = torch.arange(n) if clusters is None else as_tensor(clusters, "clusters")
        if len(ids) != n:
            raise ValueError(f"clusters must hold an id for each of the {n} samples; got {len(ids)}.")
        some = draw_rows(len(test.samples), max_samples, seed=settings.seed)
        clusters, test = ids[test.samples[some]], test.at(some)
    predictions = read(test.found)
    if test.labels is not None:
        tables = (*tables, tabulate_labels(predictions, test.targets, test.labels, n_labels, class_names, settings))
        class_names = None
    cautions = in_training_mode(methods)
    for caution in cautions:
        warnings.warn(caution, stacklevel=3)
    validation, ood = None, {}
    if validation_loader is not None and first in methods:
        held = predicted({first: methods[first]}, validation_loader, "validation data")
        logits = held.found[first].logits
        validation = (read(held.found)[first] if logits is None else logits, held.targets)
    for name, source in (ood_loaders or {}).items():
        ood[name] = read(predicted(methods, source, name, labelled=False).found)
    level = settings.confidence_level
    summaries = summarize_posteriors(laplace, level)
    if held_out_loader is not None:
        summaries = compare_held_out(laplace, summaries, held_out_loader, fitted_loader, level, progress_bar)
    report = calibration_report(
        predictions,
        test.targets,
        task=task,
        baseline=baseline,
        **vars(settings),
        class_names=class_names,
        title=title,
        description=description,
        metadata=metadata,
        tables=tables,
        figures=figures,
        target_unit=target_unit,
        posteriors=summaries,
        temperature_scaling=temperature_scaling,
        validation=validation,
        logits={name: p.logits for name, p in test.found.items() if p.logits is not None},
        ood=ood or None,
        clusters=clusters,
        max_samples=max_samples,
        thresholds=thresholds,
    )
    records = {name: _record(methods[name], p, options) for name, p in test.found.items()}
    drawn = [name for name in laplace if test.found[name].n_samples is not None]
    if not drawn or options.n_samples >= FEW_DRAWS:
        return replace(report, predicted=records, warnings=(*cautions, *report.warnings))
    warning = (
        f"Only {n_samples} draws behind the predictions of {', '.join(drawn)}: their negative log-likelihood and "
        f"calibration error are too large by what the draws add; take {FEW_DRAWS} or more."
    )
    return replace(report, predicted=records, warnings=(*cautions, warning, *report.warnings))


def _processes_of(posteriors: Iterable[BaseLaplace]) -> Processes:
    """Return the processes of the first posterior of this package, which share its passes over samples."""
    own = (la._processes for la in posteriors if isinstance(la, DebiasedParametricLaplace))
    return next(own, Processes.of())


def _rows_of(posteriors: Iterable[BaseLaplace]) -> tuple[OutputLayout | None, int]:
    """Return the layout of positions, and the number of binary labels, of which each is a row of a report."""
    for la in posteriors:
        if isinstance(la, DebiasedParametricLaplace):
            layout = la.fit_result.layout
            n_outputs = la.n_outputs if layout is None else layout.n_classes
            return layout, n_outputs if la.likelihood == "binary" else 1
    return None, 1


def _record(method: Method, predicted: BatchPrediction, options: PredictionOptions) -> PredictionRecord:
    measured = (predicted.n_samples, predicted.seconds, predicted.peak_bytes)
    if isinstance(method, BaseLaplace):
        link = None if options.task == "regression" else options.link
        return PredictionRecord("Laplace posterior", options.pred_type, link, *measured)
    return PredictionRecord("network" if isinstance(method, nn.Module) else "callable", None, None, *measured)
