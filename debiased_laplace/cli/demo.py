"""`debiased-laplace demo`: the main job on real data that ships with scikit-learn."""

import argparse
from pathlib import Path

from debiased_laplace.cli.arguments import Commands, device_named, seed


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="train a small network on scikit-learn's digits, fit three posteriors, write a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report; may exist")
    parser.add_argument("--seed", type=seed, default=0, help="of everything that is drawn")
    parser.add_argument("--device", default="auto", help='where to compute: "cpu", "cuda", … or "auto"')
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    if parsed.out.exists() and not parsed.out.is_dir():
        raise ValueError(f"--out must be a folder; {parsed.out} is a file.")
    # an unwritable place is found out now, not after the work
    parsed.out.mkdir(parents=True, exist_ok=True)
    device = device_named(parsed.device)
    # scikit-learn is for the demo alone
    from debiased_laplace import demo

    demo.run(parsed.out, parsed.seed, device)
    return 0
