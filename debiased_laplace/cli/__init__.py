"""Command line. Exit codes: 0 done or passed, 1 a threshold failed, 2 an error, 3 inconclusive with --strict."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from debiased_laplace.cli import evaluate_command, model_commands, report_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `debiased-laplace`.

    Args:
        arguments: arguments of the command line; None: those of the process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding without "±" must not change the exit code
    parsed = _parser().parse_args(arguments)
    if parsed.command != "fit" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and int(os.environ.get("RANK", 0)) > 0:
        # of the processes of torchrun, which share fits only, the first does everything else
        return 0
    import_path = list(sys.path)
    try:
        exit_code: int = parsed.run(parsed)
    except KeyboardInterrupt:
        print("debiased-laplace: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        print(f"debiased-laplace: {error or type(error).__name__}", file=sys.stderr)
        return 2
    except (Exception, SystemExit):
        # of the user's model or data, or ours; Python's own exit code 1 would say that a threshold failed
        traceback.print_exc()
        return 2
    finally:
        sys.path[:] = import_path
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="debiased-laplace",
        description="Laplace uncertainty for trained networks, with curvature that the mini-batch does not bias.",
    )
    parser.add_argument("--version", action="version", version=version("debiased-laplace"))
    commands = parser.add_subparsers(dest="command", required=True)
    model_commands.add_to(commands)
    evaluate_command.add_to(commands)
    report_commands.add_to(commands)
    return parser
