"""`debiased-laplace diagnose`: how biased a mini-batch is for a model."""

import argparse
from pathlib import Path

from debiased_laplace.cli.arguments import Commands, called, device_named, file_to_write, seed
from debiased_laplace.cli.models import add_model, trained_model
from debiased_laplace.diagnosis import diagnose


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "diagnose",
        help="how biased the curvature and the slope of a mini-batch are for a model",
        description=(
            "Measure, for a range of batch sizes, how much too large a batch's leading curvatures are, how much of its "
            "slope is real, and what debiasing would change. --model and --loader name callables without arguments as "
            "module:callable; modules of the working directory are found."
        ),
    )
    add_model(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="powers of two from 32 to 256, as data allow")
    parser.add_argument("--draws", type=int, default=3, help="of every batch (3)")
    parser.add_argument("--n-data", type=int, help="size of the data set that the likelihood stands for")
    parser.add_argument("--curvature", choices=("ggn", "ef"), default="ggn")
    parser.add_argument("--damping", type=float, default=1e-3, help="of conjugate gradients (0.001)")
    parser.add_argument("--prior-precision", type=float, default=1.0, help="of the posteriors that are compared (1)")
    parser.add_argument(
        "--no-posteriors", action="store_true", help="compare no posteriors: most of the time goes into that"
    )
    parser.add_argument("--figure", type=Path, help="picture of the findings, say found.svg; replaced if it exists")
    parser.add_argument("--seed", type=seed, default=0, help="of the draws (0)")
    parser.add_argument("--device", default="auto", help='where to compute: "cpu", "cuda", … or "auto" (default)')
    parser.add_argument("--no-progress", action="store_true", help="show no progress")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    if parsed.figure is not None:
        file_to_write(parsed.figure, "--figure")
    device = device_named(parsed.device)
    diagnosis = diagnose(
        trained_model(parsed).to(device),
        parsed.likelihood,
        called(parsed.loader, "--loader"),
        batch_sizes=parsed.batch_sizes,
        n_draws=parsed.draws,
        n_data=parsed.n_data,
        curvature=parsed.curvature,
        damping=parsed.damping,
        prior_precision=None if parsed.no_posteriors else parsed.prior_precision,
        seed=parsed.seed,
        progress_bar=not parsed.no_progress,
    )
    print(diagnosis)
    if parsed.figure is not None:
        diagnosis.save_figure(parsed.figure)
        print(f"figure: {parsed.figure}")
    return 0
