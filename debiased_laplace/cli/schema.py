"""`debiased-laplace schema`: the JSON Schema of report.json."""

import argparse

from debiased_laplace.calibration.documents.report_schema import render_schema
from debiased_laplace.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("schema", help="print the JSON Schema (2020-12) of report.json")
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    print(render_schema(), end="")
    return 0
