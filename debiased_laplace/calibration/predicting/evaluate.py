"""`evaluate`: from posteriors and a loader to a report, in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from laplace.baselaplace import BaseLaplace
from torch.utils.data import RandomSampler

from debiased_laplace.calibration.contents import ReportFigure, ReportTable
from debiased_laplace.calibration.gates.thresholds import ThresholdSource
from debiased_laplace.calibration.posteriors.held_out import judge_posteriors
from debiased_laplace.calibration.posteriors.summaries import PosteriorSummary
from debiased_laplace.calibration.posteriors.summarizing import summarize_posteriors
from debiased_laplace.calibration.predicting.collecting import Collected, collect
from debiased_laplace.calibration.predicting.methods import (
    Method,
    choose_prediction,
    find_noise,
    make_predictor,
    read_methods,
)
from debiased_laplace.calibration.predicting.pieces import as_prediction
from debiased_laplace.calibration.predicting.predictors import (
    LaplacePredictor,
    LinkApproximation,
    PredictionOptions,
    PredictionType,
    Predictor,
)
from debiased_laplace.calibration.predicting.records import PredictionRecord
from debiased_laplace.calibration.predictions.arrays import Task
from debiased_laplace.calibration.report import CalibrationReport, calibration_report
from debiased_laplace.calibration.scaling.request import TemperatureScaling
from debiased_laplace.data.inputs import MappingKeys

FEW_DRAWS = 100


def evaluate(
    posteriors: Mapping[str, Method] | BaseLaplace,
    loader: Iterable[Any],
    *,
    task: Task,
    baseline: str | None = None,
    include_map: bool | None = None,
    pred_type: PredictionType = "glm",
    link_approx: LinkApproximation | None = None,
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
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    target_unit: str | None = None,
    temperature_scaling: TemperatureScaling = "auto",
    clusters: Any = None,
    groups: Any = None,
    max_samples: int = 1_000_000,
    thresholds: ThresholdSource | None = None,
) -> CalibrationReport:
    """Predict a test set with several methods in one pass over its loader, and report on them side by side.

    Every method sees the same inputs, whatever the loader shuffles or augments, and draws the same random numbers; the
    draws start anew with every batch, so that sampled networks are the same ones for all batches. Models are left as
    they were: modes, weights, gradients, and the global random state.

    Memory: predictions on the CPU in their own dtype; samples of one batch at a time.

    Args:
        posteriors: name to method. A Laplace posterior of this package or of laplace-torch; a network, which is the
            MAP estimate: its outputs are logits, or means; any callable that maps a batch of inputs to probabilities
            (n, C), to (mean, standard deviation) with the observation noise, or to samples (S, n, C), in regression of
            the function alone. One posterior alone is called "laplace".
        loader: the test set, an iterable of batches: (inputs, targets), or mappings of tensors.
        task: "binary", "multiclass" or "regression".
        baseline: name of the method that the others are compared with; default: the first.
        include_map: whether the network of the first Laplace posterior is added, first and under the name "map"; None:
            where no network and no "map" is given, and no other baseline.
        pred_type: of Laplace posteriors: "glm", the linearized network, or "nn", networks at drawn weights.
        link_approx: of Laplace posteriors in classification: "mean_field", "probit", "mc", "bridge" or "bridge_norm";
            None: "mean_field" for "glm", "mc" for "nn". Posteriors of laplace-torch get the same link as those of this
            package, so that posteriors are compared and not links; a callable, `lambda x: la(x)`, has its own. "mc" is
            the mean over `predictive_samples`.
        n_samples: draws where Laplace posteriors predict by drawing, at least 2; below 100 the report warns.
        sigma_noise: standard deviation of the observation noise, for networks and sampling callables in regression;
            None: that of the first Laplace posterior. A Laplace posterior uses its own.
        ood_loaders: name to a loader of inputs that are none of the task's; targets are ignored.
        validation_loader: labelled samples of neither the training nor the test set, for temperature scaling of the
            baseline.
        held_out_loader: training samples left out of every fit, by which the posteriors are compared with the full
            batch (`held_out_kl`).
        fitted_loader: the samples that were fitted, of all posteriors or by name; those of laplace-torch need it.
        dict_key_x: of mappings: the tensor whose length is the number of samples; None: as the first posterior.
        dict_key_y: of mappings: the targets; None: as the first posterior.
        seed: of everything that is drawn.
        progress_bar: show progress.
        n_bins: as of `calibration_report`, and so are all that follow.
        confidence_level: coverage of the intervals.
        n_resamples: of the bootstrap.
        class_names: one per class.
        title: of the report.
        description: plain text under the verdict.
        metadata: notes on the experiment.
        tables: extra sections.
        figures: extra sections.
        levels: of central intervals (regression).
        target_unit: unit of the targets, for labels (regression).
        temperature_scaling: of the baseline; on `validation_loader` where it is given.
        clusters: ids of dependent samples, in the order of the loader.
        groups: groups of the samples, in the order of the loader.
        max_samples: pixels to draw at most.
        thresholds: gates that the report is judged by.

    Returns:
        The report, with a section on the posteriors and on how each method predicted.

    Raises:
        NotFittedError: if a posterior is not fitted.
        ValueError: if a method or a batch is not what it should be, or nothing says what the observation noise is, or
            groups or clusters are given with a loader that shuffles.
        OverlapError: if a held-out sample was fitted.

    References:
        Daxberger et al. (2021), arXiv 2106.14806 (predictives); docs/calibration_reports.md.
    """
    if not (groups is None and clusters is None):
        _refuse_shuffling(loader)
    if ood_loaders is not None and not isinstance(ood_loaders, Mapping):
        raise ValueError(f"ood_loaders must map names of sets to loaders; got {type(ood_loaders).__name__}.")
    options = choose_prediction(task, pred_type, link_approx, n_samples, seed)
    methods = read_methods(posteriors, baseline, include_map)
    first = next(iter(methods)) if baseline is None else baseline
    # MAP's logits outlive its probabilities, which may be rounded to 0 and 1
    predictors = {name: make_predictor(name, m, options, keeps_logits=name == first) for name, m in methods.items()}
    keys, noise = _choose_keys(methods, dict_key_x, dict_key_y), find_noise(methods, sigma_noise)

    def predicted(
        chosen: Mapping[str, Predictor], over: Iterable[Any], label: str, *, labelled: bool = True
    ) -> Collected:
        return collect(
            chosen,
            over,
            keys,
            with_targets=labelled,
            seed=seed,
            progress_bar=progress_bar,
            label=f"[Predicting {label}]",
        )

    found = predicted(predictors, loader, "the test set")
    validation = None
    if validation_loader is not None and first in predictors:
        held = predicted({first: predictors[first]}, validation_loader, "validation data")
        validation = (held.pieces[first].get("logits", _predictions(held, methods, noise)[first]), held.targets)
    ood = {
        name: _predictions(predicted(predictors, outside, name, labelled=False), methods, noise)
        for name, outside in (ood_loaders or {}).items()
    }
    report = calibration_report(
        _predictions(found, methods, noise),
        found.targets,
        task=task,
        baseline=baseline,
        n_bins=n_bins,
        confidence_level=confidence_level,
        n_resamples=n_resamples,
        seed=seed,
        class_names=class_names,
        title=title,
        description=description,
        metadata=metadata,
        tables=tables,
        figures=figures,
        levels=levels,
        target_unit=target_unit,
        posteriors=_describe_posteriors(
            methods,
            held_out_loader,
            fitted_loader,
            confidence_level=confidence_level,
            progress_bar=progress_bar,
        ),
        temperature_scaling=temperature_scaling,
        validation=validation,
        logits={name: piece["logits"] for name, piece in found.pieces.items() if "logits" in piece},
        ood=ood or None,
        clusters=clusters,
        groups=groups,
        max_samples=max_samples,
        thresholds=thresholds,
    )
    records = {name: _record(p, found, name, options) for name, p in predictors.items()}
    return replace(report, predicted=records, warnings=(*_warn_of_draws(records), *report.warnings))


def _refuse_shuffling(loader: Iterable[Any]) -> None:
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError("groups and clusters are in the order of the loader, which shuffles; expected shuffle=False.")


def _describe_posteriors(
    methods: Mapping[str, Method],
    held_out_loader: Iterable[Any] | None,
    fitted_loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
    *,
    confidence_level: float,
    progress_bar: bool,
) -> dict[str, PosteriorSummary]:
    """What was fitted, and where there are held-out samples how close it is to the full batch."""
    laplace = {name: m for name, m in methods.items() if isinstance(m, BaseLaplace)}
    summaries = summarize_posteriors(laplace, confidence_level=confidence_level)
    if held_out_loader is None:
        return summaries
    return judge_posteriors(
        laplace,
        summaries,
        held_out_loader,
        fitted_loader,
        confidence_level=confidence_level,
        progress_bar=progress_bar,
    )


def _choose_keys(methods: Mapping[str, Method], dict_key_x: str | None, dict_key_y: str | None) -> MappingKeys:
    """Where a mapping holds what: as told, or as the first posterior was."""
    first = next((m for m in methods.values() if isinstance(m, BaseLaplace)), None)
    defaults = MappingKeys()
    x = getattr(first, "dict_key_x", None) or defaults.dict_key_x
    y = getattr(first, "dict_key_y", None) or defaults.dict_key_y
    return MappingKeys(dict_key_x or x, dict_key_y or y)


def _predictions(found: Collected, methods: Mapping[str, Method], noise: Any) -> dict[str, Any]:
    """What `calibration_report` reads, each method with its own observation noise."""
    read = {}
    for name, piece in found.pieces.items():
        method = methods[name]
        own = method.sigma_noise if isinstance(method, BaseLaplace) else noise
        read[name] = as_prediction(name, piece, own)
    return read


def _record(predictor: Predictor, found: Collected, name: str, options: PredictionOptions) -> PredictionRecord:
    draws = found.pieces[name].get("n_samples")
    n_samples = None if draws is None else int(draws.min())
    pred_type = link = None
    if isinstance(predictor, LaplacePredictor):
        pred_type, link = options.pred_type, None if options.task == "regression" else options.link
        n_samples = options.n_samples if options.sampled else None
    seconds, peak = found.seconds[name], found.peak_bytes[name]
    return PredictionRecord(predictor.kind, pred_type, link, n_samples, seconds, peak)


def _warn_of_draws(records: Mapping[str, PredictionRecord]) -> list[str]:
    few = {name: r.n_samples for name, r in records.items() if r.pred_type and r.n_samples and r.n_samples < FEW_DRAWS}
    if not few:
        return []
    return [
        f"Only {next(iter(few.values()))} draws behind the predictions of {', '.join(few)}: their negative "
        f"log-likelihood and calibration error are too large by what the draws add; take {FEW_DRAWS} or more."
    ]
