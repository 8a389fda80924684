"""`debiased-laplace compare`: what changed between two stored reports."""

import argparse
from pathlib import Path

from debiased_laplace.calibration import CalibrationReport
from debiased_laplace.calibration.changes.comparing import compare_reports
from debiased_laplace.calibration.rendering.changes_markdown import render_changes
from debiased_laplace.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="say what changed between two stored reports",
        description="Print, in Markdown, what changed for every method and metric, and what of it is detectable.",
    )
    parser.add_argument("old", type=Path, help="the older report.json")
    parser.add_argument("new", type=Path, help="the newer report.json")
    parser.add_argument("--fail-on-worse", action="store_true", help="exit code 1 if a metric got detectably worse")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    old, new = (CalibrationReport.from_json(path) for path in (parsed.old, parsed.new))
    changes = compare_reports(old, new)
    print(render_changes(changes, old, new), end="")
    return 1 if parsed.fail_on_worse and changes.worse else 0
