"""What commands with gates share: where thresholds come from, and what follows from their outcomes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from debiased_laplace.cli.arguments import file_to_write

if TYPE_CHECKING:
    from debiased_laplace.calibration.gates.outcomes import ThresholdOutcome
    from debiased_laplace.calibration.gates.thresholds import Threshold

PASSED, FAILED, INCONCLUSIVE = 0, 1, 3


def add_thresholds(parser: argparse.ArgumentParser, *, option: str, required: bool) -> None:
    """Options of a gate; exit codes 1 where a threshold failed and, with --strict, 3 where one is inconclusive."""
    given = parser.add_argument_group("gates", "exit code 1: a threshold failed; 3: one is inconclusive, with --strict")
    source = given.add_mutually_exclusive_group(required=required)
    source.add_argument(option, dest="thresholds", type=Path, metavar="THRESHOLDS.TOML", help="thresholds to judge by")
    source.add_argument(
        "--defaults",
        action="store_true",
        help="judge by the default ones: no more NLL than the baseline, at most 0.5 points of accuracy lost",
    )
    given.add_argument("--junit", type=Path, metavar="JUNIT.XML", help="write the outcomes for a CI server")
    given.add_argument("--strict", action="store_true", help="a threshold that cannot be decided is no success")


def given_thresholds(parsed: argparse.Namespace, task: str) -> "tuple[Threshold, ...] | None":
    """The thresholds that were asked for; None for none."""
    from debiased_laplace.calibration.gates.thresholds import DEFAULT, read_thresholds

    if parsed.thresholds is None and not parsed.defaults:
        if parsed.junit is not None or parsed.strict:
            raise ValueError("--junit and --strict are about thresholds; got none.")
        return None
    if parsed.junit is not None:
        file_to_write(parsed.junit, "--junit")
    return read_thresholds(DEFAULT if parsed.defaults else parsed.thresholds, task)


def conclude(outcomes: "tuple[ThresholdOutcome, ...]", parsed: argparse.Namespace) -> int:
    """Print the outcomes, write them for a CI server, and return the exit code."""
    from debiased_laplace.calibration.gates.checking import CheckResult

    result = CheckResult(outcomes)
    if parsed.junit is not None:
        parsed.junit.write_text(result.to_junit(strict=parsed.strict), encoding="utf-8", newline="\n")
    print(result)
    print(f"{result.status}.")
    if result.status == "failed":
        return FAILED
    return INCONCLUSIVE if result.status == "inconclusive" and parsed.strict else PASSED
