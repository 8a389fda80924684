"""`debiased-laplace check`: gates on a stored report."""

import argparse
from pathlib import Path

from debiased_laplace.calibration import CalibrationReport
from debiased_laplace.cli.arguments import Commands
from debiased_laplace.cli.gating import add_thresholds, conclude, given_thresholds


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="judge a stored report by thresholds",
        description="Judge a report by thresholds, on its confidence bounds unless they say otherwise.",
    )
    parser.add_argument("report", type=Path, help="report.json")
    add_thresholds(parser, option="--thresholds", required=True)
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    report = CalibrationReport.from_json(parsed.report)
    thresholds = given_thresholds(parsed, report.task)
    return conclude(report.check(thresholds or ()).outcomes, parsed)
