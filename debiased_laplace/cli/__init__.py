"""The command line. Exit codes: 0 done or passed, 1 a threshold failed, 2 bad input, 3 inconclusive under --strict."""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.metadata import version

from debiased_laplace.cli import demo, diagnose, fit, gates, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `debiased-laplace`.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that knows no minus sign must not change the exit code
    parsed = _parser().parse_args(arguments)
    try:
        run: int = parsed.run(parsed)
    except KeyboardInterrupt:
        print("debiased-laplace: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"debiased-laplace: {error}", file=sys.stderr)
        return 2
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="debiased-laplace",
        description="Laplace uncertainty for trained networks, with curvature that the mini-batch does not bias.",
    )
    parser.add_argument("--version", action="version", version=version("debiased-laplace"))
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, fit, report, gates, diagnose):
        command.add_to(commands)
    return parser
