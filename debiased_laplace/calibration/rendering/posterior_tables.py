"""What was fitted, how it predicted, and which posterior is closer to the full batch, as tables."""

from debiased_laplace.calibration.contents import ReportTable
from debiased_laplace.calibration.posteriors.summaries import PosteriorSummary
from debiased_laplace.calibration.predicting.records import PredictionRecord
from debiased_laplace.calibration.rendering.formatting import (
    NOTHING,
    choose_decimals,
    format_number,
    format_p_value,
    format_with_interval,
)

PREDICTIVES = {"glm": "linearized", "nn": "drawn networks"}
MAGNITUDES = {
    "held_out": "from other samples (held_out)",
    "cross_fitted": "from other folds (cross_fitted)",
    "same_batch": "from the same samples (same_batch)",
}


def tabulate_posteriors(posteriors: dict[str, PosteriorSummary]) -> ReportTable:
    """Properties as rows, posteriors as columns; a property that nobody has is left out."""
    rows = []
    for label, show in _PROPERTIES:
        cells = [show(s) for s in posteriors.values()]
        if any(cell != NOTHING for cell in cells):
            rows.append([label, *cells])
    return ReportTable("What was fitted", ["", *posteriors], rows)


def tabulate_predictions(predicted: dict[str, PredictionRecord]) -> ReportTable:
    """How each method predicted, and for how long."""
    rows = [
        [
            name,
            r.kind,
            NOTHING if r.pred_type is None else PREDICTIVES[r.pred_type] + (f", {r.link}" if r.link else ""),
            r.n_samples,
            _seconds(r.seconds),
            NOTHING if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f} MiB",
        ]
        for name, r in predicted.items()
    ]
    columns = ["method", "kind", "predictive", "draws", "time", "GPU memory, peak"]
    return ReportTable("How the methods predicted", columns, rows)


def tabulate_held_out(posteriors: dict[str, PosteriorSummary]) -> ReportTable | None:
    """Differences of the held-out KL with their verdicts; None where nothing was compared."""
    judged = {name: s.held_out for name, s in posteriors.items() if s.held_out is not None}
    if not judged:
        return None
    rows = []
    for name, h in judged.items():
        decimals = min(2, choose_decimals([h.standard_error]) or 0)
        change = format_with_interval(h.difference, h.low, h.high, decimals, signed=True)
        rows.append([name, h.reference, change, format_p_value(h.p_value), h.n, h.verdict])
    columns = ["posterior", "against", "difference in nats", "Holm-adjusted p", "held-out samples", "verdict"]
    return ReportTable("Distance to the full batch", columns, rows)


def _text(value: str | None) -> str:
    return NOTHING if value is None else value


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}".replace(",", "\u202f")


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _samples(s: PosteriorSummary) -> str:
    if s.n_direction_samples is None:
        return NOTHING
    if s.shared_samples:
        return _count(s.n_direction_samples)
    return f"{_count(s.n_direction_samples)} for directions, {_count(s.n_magnitude_samples)} for magnitudes"


def _complement(s: PosteriorSummary) -> str:
    if s.complement is None:
        return NOTHING
    share = "" if s.share_outside is None or s.complement == "none" else f", {100 * s.share_outside:.2g} % of the trace"
    return s.complement + share


def _prior(s: PosteriorSummary) -> str:
    if s.prior_low is None or s.prior_high is None:
        return NOTHING
    one = s.prior_low == s.prior_high
    return format_number(s.prior_low) if one else f"{format_number(s.prior_low)} to {format_number(s.prior_high)}"


_PROPERTIES = (
    ("class", lambda s: s.kind),
    ("weights", lambda s: _text(s.weights)),
    ("structure", lambda s: _text(s.structure)),
    ("curvature", lambda s: _text(s.curvature)),
    ("computed by", lambda s: _text(s.source)),
    ("parameters", lambda s: _count(s.n_parameters)),
    ("data set, N", lambda s: _count(s.n_data)),
    ("samples for the curvature", _samples),
    ("directions", lambda s: _count(s.rank)),
    ("curvature along them", lambda s: _text(MAGNITUDES.get(s.magnitudes or "", s.magnitudes))),
    ("curvature outside them", _complement),
    ("metric", lambda s: _text(s.metric if s.metric != "euclidean" else None)),
    ("prior precision", _prior),
    ("observation noise", lambda s: format_number(s.sigma_noise)),
    ("temperature", lambda s: format_number(s.temperature if s.temperature != 1 else None)),
    ("effective parameters", lambda s: format_number(s.effective_parameters)),
    ("log marginal likelihood", lambda s: format_number(s.log_marginal_likelihood)),
    ("time of the fit", lambda s: _seconds(s.fit_seconds)),
)
