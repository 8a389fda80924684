"""Commands on predictions and reports: `report`, `check` and `compare`."""

import argparse
from pathlib import Path
from typing import Any

from debiased_laplace.calibration import CalibrationReport, calibration_report
from debiased_laplace.calibration.changes import compare_reports, render_changes
from debiased_laplace.calibration.check import DEFAULT, CheckResult, Threshold, read_thresholds
from debiased_laplace.cli.arguments import Commands, check_folder, check_writable, make_folder, seed
from debiased_laplace.cli.prediction_archive import LAYOUT, read_archive
from debiased_laplace.files import replacing

FORMATS = ("html", "json", "md", "csv")
PASSED, FAILED, INCONCLUSIVE = 0, 1, 3


def add_to(commands: Commands) -> None:
    """Add the commands."""
    _add_report(commands)
    _add_check(commands)
    _add_compare(commands)


# --- report ---


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a calibration report of stored predictions",
        description="Write a calibration report of the predictions in an .npz file (numpy.savez) with these arrays:",
        epilog=LAYOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, help="the .npz file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report; may exist")
    parser.add_argument(
        "--noise-included", action="store_true", help="covariances and samples include observation noise"
    )
    add_presentation(parser)
    parser.set_defaults(run=_run_report)


def add_presentation(parser: argparse.ArgumentParser) -> None:
    """Add the options for what a report shows, how, and which thresholds it has to keep."""
    parser.add_argument("--format", type=_formats, default=("html", "json", "md"), help="out of html,json,md,csv")
    parser.add_argument("--task", choices=("binary", "multiclass", "regression"), help="default: from the predictions")
    parser.add_argument("--baseline", help="method that the others are compared with; default: the first")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--description", help="plain text below the verdict")
    parser.add_argument("--class-names", type=_names, help="names separated by commas")
    parser.add_argument("--target-unit", help="unit of regression targets, for labels")
    parser.add_argument("--temperature-scaling", choices=("auto", "cross_fitted", "validation", "none"), default="auto")
    parser.add_argument("--n-bins", type=int, default=15, help="number of confidence bins")
    parser.add_argument("--confidence-level", type=float, default=0.95, help="level of all intervals")
    parser.add_argument("--n-resamples", type=int, default=1000, help="number of draws for p-values")
    parser.add_argument("--seed", type=seed, default=0, help="seed of all random draws")
    _add_thresholds(parser, option="--fail-on", required=False)


_PRESENTATION = (
    "baseline",
    "n_bins",
    "confidence_level",
    "n_resamples",
    "seed",
    "class_names",
    "title",
    "description",
    "target_unit",
    "temperature_scaling",
)


def presentation(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the given options of a report, as `calibration_report` and `evaluate` take them."""
    return {name: getattr(parsed, name) for name in _PRESENTATION}


def publish(report: CalibrationReport, parsed: argparse.Namespace) -> int:
    """Write and print a report, judge it where there are thresholds, and return the exit code."""
    paths = report.save(parsed.out, formats=parsed.format)
    print(report)
    print("\n" + "\n".join(f"wrote {path}" for path in paths))
    given = parsed.thresholds is not None or parsed.defaults
    return _conclude(CheckResult(report.checks), parsed) if given else PASSED


def _formats(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected names out of {', '.join(FORMATS)}; got {text!r}")
    return names


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _run_report(parsed: argparse.Namespace) -> int:
    check_folder(parsed.out)
    archive = read_archive(parsed.predictions, noise_included=parsed.noise_included)
    task = parsed.task or archive.task
    if (task == "regression") != (archive.kind == "regression"):
        raise ValueError(f"--task {task} does not fit {parsed.predictions}, which has {archive.kind} predictions.")
    thresholds = read_given_thresholds(parsed, task)
    make_folder(parsed.out)
    report = calibration_report(
        archive.predictions,
        archive.targets,
        task=task,
        validation=archive.validation,
        logits=archive.logits or None,
        ood=archive.ood or None,
        clusters=archive.clusters,
        thresholds=thresholds,
        **presentation(parsed),
    )
    return publish(report, parsed)


# --- check and compare ---


def _add_check(commands: Commands) -> None:
    parser = commands.add_parser(
        "check",
        help="check a stored report against thresholds",
        description="Check a report against thresholds, by confidence bounds unless a threshold says otherwise.",
    )
    parser.add_argument("report", type=Path, help="report.json")
    _add_thresholds(parser, option="--thresholds", required=True)
    parser.set_defaults(run=_run_check)


def _add_compare(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="list the changes between two stored reports",
        description="Print, in Markdown, the change of every metric of every method, and which changes are detectable.",
    )
    parser.add_argument("old", type=Path, help="the older report.json")
    parser.add_argument("new", type=Path, help="the newer report.json")
    parser.add_argument("--fail-on-worse", action="store_true", help="exit code 1 if a metric got detectably worse")
    parser.set_defaults(run=_run_compare)


def _add_thresholds(parser: argparse.ArgumentParser, *, option: str, required: bool) -> None:
    """Add the options of a check."""
    group = parser.add_argument_group(
        "checks", "exit code 1: a threshold failed; 3: one is inconclusive, with --strict"
    )
    source = group.add_mutually_exclusive_group(required=required)
    source.add_argument(option, dest="thresholds", type=Path, metavar="THRESHOLDS.TOML", help="file of thresholds")
    source.add_argument(
        "--defaults",
        action="store_true",
        help="default thresholds: NLL not above the baseline's, at most 0.5 points of accuracy lost",
    )
    group.add_argument("--junit", type=Path, metavar="JUNIT.XML", help="write the outcomes for a CI server")
    group.add_argument("--strict", action="store_true", help="exit code 3 if a threshold is inconclusive")


def read_given_thresholds(parsed: argparse.Namespace, task: str) -> tuple[Threshold, ...] | None:
    """Read the given thresholds; return None if there are none.

    Raises:
        ValueError: if thresholds are invalid, or missing although --junit or --strict is given.
        OSError: if a file cannot be read or written.
    """
    if parsed.thresholds is None and not parsed.defaults:
        if parsed.junit is not None or parsed.strict:
            raise ValueError("--junit and --strict require thresholds; got none.")
        return None
    if parsed.junit is not None:
        check_writable(parsed.junit, "--junit")
    return read_thresholds(DEFAULT if parsed.defaults else parsed.thresholds, task)


def _conclude(result: CheckResult, parsed: argparse.Namespace) -> int:
    """Print the outcomes, write them for a CI server, and return the exit code."""
    if parsed.junit is not None:
        with replacing(parsed.junit) as (part,):
            part.write_text(result.to_junit(strict=parsed.strict), encoding="utf-8", newline="\n")
    print(result)
    print(f"{result.status}.")
    if result.status == "failed":
        return FAILED
    return INCONCLUSIVE if result.status == "inconclusive" and parsed.strict else PASSED


def _run_check(parsed: argparse.Namespace) -> int:
    report = CalibrationReport.from_json(parsed.report)
    return _conclude(report.check(read_given_thresholds(parsed, report.task) or ()), parsed)


def _run_compare(parsed: argparse.Namespace) -> int:
    old, new = (CalibrationReport.from_json(path) for path in (parsed.old, parsed.new))
    changes = compare_reports(old, new)
    print(render_changes(changes, old, new), end="")
    return FAILED if parsed.fail_on_worse and any(c.verdict == "worse" for c in changes) else PASSED
