"""The report as one HTML file: no scripts, nothing from the network."""

import base64
import re
from importlib.resources import files
from math import copysign, sqrt
from typing import NamedTuple
from urllib.parse import quote

import matplotlib.style
import pandas as pd
from markupsafe import Markup, escape

from debiased_laplace.calibration import formatting, tables
from debiased_laplace.calibration.contents import (
    PAIRED_AS,
    Better,
    ClassCount,
    ClassificationCurves,
    MetricDefinition,
    ReportContents,
    ReportFigure,
    Section,
)
from debiased_laplace.calibration.findings import (
    CAUTION,
    CONFIDENCE_TARGETS,
    describe_brackets,
    is_worse_than_constant,
    name_confidence,
    name_reference,
)
from debiased_laplace.calibration.formatting import NO_BREAK, NOTHING, format_interval, format_number
from debiased_laplace.calibration.html import figures
from debiased_laplace.calibration.svg import inline_svg
from debiased_laplace.calibration.tables import make_table

DIRECTIONS: dict[Better, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "0 is right",
    "one": "1 is right",
    "level": "the nominal level is right",
    "none": "",
}
SHOWN_BESIDE = ("_noise_floor", "_p_value")  # of another metric: no rows of their own
MAX_CLASSES = 20
REFERENCE = re.compile(r"(doi:|arXiv:)(\S+[^\s;.,])")
RESOLVERS = {"doi:": "https://doi.org/", "arXiv:": "https://arxiv.org/abs/"}


class Cell(NamedTuple):
    """An estimate of one method: value, interval, remarks, and the verdicts of its comparisons with their words."""

    value: str
    interval: str = ""
    asides: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()


def render_html(contents: ReportContents) -> str:
    """Return the whole page."""
    environment = tables.make_environment(autoescape=True)
    environment.filters |= {"cite": link_references, "encode": encode_figure}
    modules = {"figures": figures, "tables": tables, "formatting": formatting}
    environment.globals |= {**modules, "inline_svg": inline_svg}
    style = (files(__package__) / "style.css").read_text(encoding="utf-8")
    with matplotlib.style.context("default"):  # whatever the caller draws with
        return environment.get_template("page.html.j2").render(
            contents=contents,
            style=Markup(style),
            level=formatting.format_level(contents.settings["confidence_level"]).replace(" ", NO_BREAK),
            caution=CAUTION,
            brackets=describe_brackets(contents),
            headline=list_rows(contents, "headline"),
            detail=list_rows(contents, "detail"),
            classes=tabulate_classes(contents),
            max_classes=MAX_CLASSES,
            settings=list_settings(contents),
            scaled="" if contents.scaling is None else contents.scaling.short_name,
        )


def list_rows(contents: ReportContents, section: Section) -> list[tuple[str, str, list[Cell]]]:
    """Return the label, a remark and the cells of each metric of one section."""
    rows = []
    for name, decimals in tables.list_metrics(contents, section).items():
        if not name.endswith(SHOWN_BESIDE):
            definition = contents.definitions[name]
            aside = ", in ".join(filter(None, (DIRECTIONS[definition.better], show_unit(contents, definition))))
            cells = [make_cell(contents, method, name, decimals) for method in contents.methods]
            rows.append((definition.label, aside, cells))
    return rows


def make_cell(contents: ReportContents, method: str, name: str, decimals: int | None) -> Cell:
    """Return one metric of one method with its interval, remarks and verdicts."""
    metrics = contents.methods[method].metrics
    estimate = metrics.get(name)
    if estimate is None or estimate.value is None:
        return Cell(NOTHING, asides=() if estimate is None else (estimate.reason or "",))
    asides = []
    if floor := metrics.get(f"{name}_noise_floor"):
        asides.append(f"chance alone: {format_number(floor.value)}")
    if (p := metrics.get(f"{name}_p_value")) and p.value is not None:
        asides.append(formatting.format_p_value(p.value))
    if name == "rmsce2_debiased":
        asides.append(f"signed root: {format_number(copysign(sqrt(abs(estimate.value)), estimate.value), 3)}")
    if name in CONFIDENCE_TARGETS:
        asides.append(name_confidence(name, estimate) or "neither detectably")
    if is_worse_than_constant(contents, method, name):
        asides.append(f"worse than a constant: {format_number(contents.constant[name], decimals)}")
    value = format_number(estimate.value, decimals, signed=name == "confidence_gap")
    interval = format_interval(estimate.low, estimate.high, decimals)
    return Cell(value, interval, tuple(asides), list_changes(contents, method, name))


def list_changes(contents: ReportContents, method: str, name: str) -> tuple[tuple[str, str], ...]:
    """Return the verdict and its words for each comparison of a method by one metric."""
    compared = [c for c in contents.comparisons if (c.method, c.metric) == (method, PAIRED_AS.get(name, name))]
    detected = [c for c in compared if c.verdict != "no detectable difference"]
    if compared and not detected:
        return (("", "no detectable difference"),)
    return tuple((c.verdict, f"{c.verdict} than {name_reference(contents, c.baseline)}") for c in detected)


def show_unit(contents: ReportContents, definition: MetricDefinition) -> str:
    """Return the unit of a metric; empty where that of the targets is unknown."""
    unit = contents.data.target_unit
    return "" if not unit or not definition.unit else f"({unit})²" if definition.unit == "squared" else unit


def tabulate_classes(contents: ReportContents) -> pd.DataFrame:
    """Return the accuracy and the calibration of each class by every method, the baseline's worst classes first."""
    curves = {m: r.curves.classes for m, r in contents.methods.items() if isinstance(r.curves, ClassificationCurves)}

    def show(c: ClassCount) -> tuple[str, str]:
        accuracy = f"{format_number(c.n_correct / c.n, 3)} {format_interval(c.low, c.high, 2)}"
        return accuracy, f"{format_number(c.error)} / {format_number(c.noise_floor)}"

    counted = [c for c in curves.get(contents.baseline, ()) if c.n]
    rows = [
        [contents.data.name_class(c.label), c.n, *(cell for own in curves.values() for cell in show(own[c.label]))]
        for c in sorted(counted, key=lambda c: (c.n_correct / c.n, c.label))[:MAX_CLASSES]
    ]
    columns = [f"{method}: {what}" for method in curves for what in ("accuracy", "ECE / by chance")]
    return make_table(["class", "samples", *columns], rows)


def list_settings(contents: ReportContents) -> dict[str, str]:
    """Return the caller's notes, the options, the versions of the software and the digest of the targets."""
    versions = {f"{name} version": version for name, version in contents.software.items()}
    digest = {"digest of the targets": contents.data.targets_sha256[:16]}
    settings = {**contents.metadata, **contents.settings, **versions, **digest}
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in settings.items()}


def link_references(reference: str) -> Markup:
    """Return a reference with its identifiers as links; nothing is loaded unless the reader follows one."""
    link = Markup('<a href="{}" rel="noreferrer">{}</a>')
    texts = REFERENCE.split(reference)  # text, kind, identifier, text, ...
    parts = [escape(texts[0])]
    for kind, found, text in zip(texts[1::3], texts[2::3], texts[3::3], strict=True):
        parts += [link.format(RESOLVERS[kind] + quote(found, safe="/.:()-"), kind + found), escape(text)]
    return Markup().join(parts)


def encode_figure(figure: ReportFigure) -> str:
    """Return a figure of the caller's as the address of an image, in which nothing can run or load."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.svg.encode()).decode()
