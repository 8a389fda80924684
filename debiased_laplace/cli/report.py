"""`debiased-laplace report`: from predictions in an .npz file to a report, and gates on it."""

import argparse
from pathlib import Path

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.check import CheckResult
from debiased_laplace.cli.arguments import Commands, seed
from debiased_laplace.cli.gates import add_thresholds, conclude, given_thresholds
from debiased_laplace.cli.prediction_archive import LAYOUT, read_archive

FORMATS = ("html", "json", "md", "csv")


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write a calibration report of stored predictions",
        description="Write a calibration report of the predictions in an .npz file (numpy.savez), whose arrays are:",
        epilog=LAYOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, help="the .npz file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report; may exist")
    parser.add_argument("--format", type=_formats, default=("html", "json", "md"), help="out of html,json,md,csv")
    parser.add_argument("--task", choices=("binary", "multiclass", "regression"), help="default: by the arrays")
    parser.add_argument("--baseline", help="method that the others are compared with; default: the first")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--description", help="plain text under the verdict")
    parser.add_argument("--class-names", type=_names, help="names separated by commas")
    parser.add_argument("--target-unit", help="unit of regression targets, for labels")
    parser.add_argument("--noise-included", action="store_true", help="covariances and samples hold observation noise")
    parser.add_argument("--temperature-scaling", choices=("auto", "cross_fitted", "validation", "none"), default="auto")
    parser.add_argument("--n-bins", type=int, default=15, help="bins of confidence")
    parser.add_argument("--confidence-level", type=float, default=0.95, help="of all intervals")
    parser.add_argument("--n-resamples", type=int, default=1000, help="draws behind p-values")
    parser.add_argument("--seed", type=seed, default=0, help="of everything that is drawn")
    add_thresholds(parser, option="--fail-on", required=False)
    parser.set_defaults(run=_run)


def _formats(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected names out of {', '.join(FORMATS)}; got {text!r}")
    return names


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _run(parsed: argparse.Namespace) -> int:
    if parsed.out.exists() and not parsed.out.is_dir():
        raise ValueError(f"--out must be a folder; {parsed.out} is a file.")
    archive = read_archive(parsed.predictions, noise_included=parsed.noise_included)
    task = parsed.task or archive.task
    if (task == "regression") != (archive.kind == "regression"):
        raise ValueError(f"--task {task} does not fit {parsed.predictions}, which holds {archive.kind} predictions.")
    thresholds = given_thresholds(parsed, task)
    # an unwritable place is found out now, not after the work
    parsed.out.mkdir(parents=True, exist_ok=True)
    report = calibration_report(
        archive.predictions,
        archive.targets,
        task=task,
        baseline=parsed.baseline,
        n_bins=parsed.n_bins,
        confidence_level=parsed.confidence_level,
        n_resamples=parsed.n_resamples,
        seed=parsed.seed,
        class_names=parsed.class_names,
        title=parsed.title,
        description=parsed.description,
        target_unit=parsed.target_unit,
        temperature_scaling=parsed.temperature_scaling,
        validation=archive.validation,
        logits=archive.logits or None,
        ood=archive.ood or None,
        clusters=archive.clusters,
        thresholds=thresholds,
    )
    paths = report.save(parsed.out, formats=parsed.format)
    print(report)
    print("\n" + "\n".join(f"wrote {path}" for path in paths))
    return 0 if thresholds is None else conclude(CheckResult(report.checks), parsed)
