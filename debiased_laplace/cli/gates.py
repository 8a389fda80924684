"""`debiased-laplace check` and `compare`: gates on stored reports, and the options of gates that `report` has too."""

import argparse
from pathlib import Path

from debiased_laplace.calibration import CalibrationReport
from debiased_laplace.calibration.changes import compare_reports, render_changes
from debiased_laplace.calibration.check import DEFAULT, CheckResult, Threshold, read_thresholds
from debiased_laplace.cli.arguments import Commands, file_to_write

PASSED, FAILED, INCONCLUSIVE = 0, 1, 3


def add_to(commands: Commands) -> None:
    """Add both commands."""
    check = commands.add_parser(
        "check",
        help="judge a stored report by thresholds",
        description="Judge a report by thresholds, on its confidence bounds unless they say otherwise.",
    )
    check.add_argument("report", type=Path, help="report.json")
    add_thresholds(check, option="--thresholds", required=True)
    check.set_defaults(run=_check)
    compare = commands.add_parser(
        "compare",
        help="say what changed between two stored reports",
        description="Print, in Markdown, what changed for every method and metric, and what of it is detectable.",
    )
    compare.add_argument("old", type=Path, help="the older report.json")
    compare.add_argument("new", type=Path, help="the newer report.json")
    compare.add_argument("--fail-on-worse", action="store_true", help="exit code 1 if a metric got detectably worse")
    compare.set_defaults(run=_compare)


def add_thresholds(parser: argparse.ArgumentParser, *, option: str, required: bool) -> None:
    """Add the options of a gate."""
    group = parser.add_argument_group("gates", "exit code 1: a threshold failed; 3: one is inconclusive, with --strict")
    source = group.add_mutually_exclusive_group(required=required)
    source.add_argument(option, dest="thresholds", type=Path, metavar="THRESHOLDS.TOML", help="thresholds to judge by")
    source.add_argument(
        "--defaults",
        action="store_true",
        help="judge by the default ones: no more NLL than the baseline, at most 0.5 points of accuracy lost",
    )
    group.add_argument("--junit", type=Path, metavar="JUNIT.XML", help="write the outcomes for a CI server")
    group.add_argument("--strict", action="store_true", help="a threshold that cannot be decided is no success")


def given_thresholds(parsed: argparse.Namespace, task: str) -> tuple[Threshold, ...] | None:
    """Read the thresholds that were asked for; None for none.

    Raises:
        ValueError: for wrong thresholds, or options of gates without any.
        OSError: if a file cannot be read or written.
    """
    if parsed.thresholds is None and not parsed.defaults:
        if parsed.junit is not None or parsed.strict:
            raise ValueError("--junit and --strict are about thresholds; got none.")
        return None
    if parsed.junit is not None:
        file_to_write(parsed.junit, "--junit")
    return read_thresholds(DEFAULT if parsed.defaults else parsed.thresholds, task)


def conclude(result: CheckResult, parsed: argparse.Namespace) -> int:
    """Print the outcomes, write them for a CI server, and return the exit code."""
    if parsed.junit is not None:
        parsed.junit.write_text(result.to_junit(strict=parsed.strict), encoding="utf-8", newline="\n")
    print(result)
    print(f"{result.status}.")
    if result.status == "failed":
        return FAILED
    return INCONCLUSIVE if result.status == "inconclusive" and parsed.strict else PASSED


def _check(parsed: argparse.Namespace) -> int:
    report = CalibrationReport.from_json(parsed.report)
    return conclude(report.check(given_thresholds(parsed, report.task) or ()), parsed)


def _compare(parsed: argparse.Namespace) -> int:
    old, new = (CalibrationReport.from_json(path) for path in (parsed.old, parsed.new))
    changes = compare_reports(old, new)
    print(render_changes(changes, old, new), end="")
    return FAILED if parsed.fail_on_worse and any(c.verdict == "worse" for c in changes) else PASSED
