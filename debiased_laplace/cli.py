"""The command line. Exit codes: 0 done, 2 bad input."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `debiased-laplace`.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit code.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return _demo(parsed)
    except KeyboardInterrupt:
        print("debiased-laplace: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"debiased-laplace: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="debiased-laplace",
        description="Laplace uncertainty for trained networks, with curvature that the mini-batch does not bias.",
    )
    parser.add_argument("--version", action="version", version=version("debiased-laplace"))
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a small network on scikit-learn's digits, fit four posteriors, write a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report; may exist")
    demo.add_argument("--seed", type=_seed, default=0, help="of everything that is drawn")
    demo.add_argument("--device", default="auto", help='where to compute: "cpu", "cuda", … or "auto"')
    return parser


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1; got {text}")
    return value


def _demo(parsed: argparse.Namespace) -> int:
    # torch takes seconds to load: not for --help
    import torch

    if parsed.out.exists() and not parsed.out.is_dir():
        raise ValueError(f"--out must be a folder; {parsed.out} is a file.")
    # an unwritable place is found out now, not after the work
    parsed.out.mkdir(parents=True, exist_ok=True)
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if parsed.device == "auto" else parsed.device
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {parsed.device!r} cannot be used: {error}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script")
        from debiased_laplace import demo
    demo.run(parsed.out, parsed.seed, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
