"""Scores to draw rows by: how close to the full batch are the posteriors of as many rows?

    python -m benchmarks.row_scores                       # 24 C rows, four tasks of classification
    python -m benchmarks.row_scores --tasks digits --draws 2

The default is the squared norm of a row's part in the last layer. Against it: the size of the cotangent alone, equal
scores, and ridge leverage in the last layer, which takes a second pass over the data: a row that repeats what others
say is worth less by it.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from torch import Tensor

from benchmarks.drawn_rows import DRAWN, NAMES, PRIORS, Measured, shown
from benchmarks.fidelity_criteria import distances
from benchmarks.fidelity_posteriors import Examination, set_prior
from benchmarks.fidelity_results import mean_of
from benchmarks.fidelity_tasks import RECIPES
from debiased_laplace.curvature import drawn_rows
from debiased_laplace.curvature.drawn_rows import RowScorer, ScoredRows
from debiased_laplace.curvature.linear_layer import features_of, output_layer
from debiased_laplace.curvature.output_rows import cotangents
from debiased_laplace.data.batches import Batch

TASKS = [name for name in RECIPES if name != "diabetes"]
RIDGE = 1.0
"""Prior precision in the leverage, whatever that of the posterior is."""


def last_layer_rows(scorer: RowScorer, found: ScoredRows) -> Tensor:
    """Rows (n r, C (d + 1)) with respect to the last layer and its bias."""
    network = scorer.network
    layer = output_layer(network.selection, network.parameters, found.batch.inputs)
    assert layer is not None
    seen = features_of(network.selection, network.parameters, layer, found.batch.inputs)
    assert seen is not None
    features = seen[0].double()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    n, r = found.sizes.shape
    samples, rows = torch.arange(n).repeat_interleave(r), torch.arange(r).repeat(n)
    columns = cotangents(scorer.root, found.outputs, found.batch.targets, samples, rows)
    return (columns[:, :, None] * features[samples][:, None, :]).flatten(1)


class SizeScorer(RowScorer):
    """Scores by the cotangents alone."""

    def scored(self, loaded: Batch) -> ScoredRows:
        """Score the rows of samples."""
        found = super().scored(loaded)
        return ScoredRows(found.batch, found.outputs, found.sizes, found.sizes)


class LeverageScorer(RowScorer):
    """Scores by ridge leverage, given the data for a pass of its own."""

    def __init__(self, data: Batch, *arguments: Any):
        super().__init__(*arguments)
        total, n = torch.zeros(1), 0
        for part in data.chunks(256):
            v = last_layer_rows(self, super().scored(part))
            total, n = total + v.mT @ v, n + len(part)
        H = total / n
        self._inverse = torch.linalg.inv(H + RIDGE / n * torch.eye(len(H)))

    def scored(self, loaded: Batch) -> ScoredRows:
        """Score the rows of samples."""
        found = super().scored(loaded)
        v = last_layer_rows(self, found)
        scores = ((v @ self._inverse) * v).sum(1).clamp_min(0).view_as(found.sizes)
        return ScoredRows(found.batch, found.outputs, found.sizes, scores * (found.sizes > 0))


def measured(task: Measured, n_rows: int, draws: int) -> dict[str, dict[tuple[float, str], list[float]]]:
    """Distances by score, and by prior and criterion: one for each draw."""
    data = Batch(*task.task.train.tensors)
    scorers: dict[str, Any] = {
        "norm in the last layer": RowScorer,
        "ridge leverage in the last layer": lambda *arguments: LeverageScorer(data, *arguments),
        "size": SizeScorer,
        "equal": lambda network, root, first, _: RowScorer(network, root, first, "equal"),
    }
    found: dict[str, dict[tuple[float, str], list[float]]] = {}
    for name, scorer in scorers.items():
        of_name = found.setdefault(name, {})
        for draw in range(draws):
            with patch.object(drawn_rows, "RowScorer", scorer):
                examination = Examination(task.task, task.fitted(n_rows, DRAWN, draw))
            for prior, full in task.references.items():
                set_prior(examination.la, prior)
                distance = distances(examination.approximation(prior), full)
                for criterion in NAMES:
                    of_name.setdefault((prior, criterion), []).append(distance[criterion])
    return found


def main() -> None:
    """Measure and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=24, help="rows are this times the number of classes")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fidelity"))
    options = parser.parse_args()
    for name in options.tasks:
        task = Measured.load(name, options.cache)
        n_rows = options.samples * task.n_outputs
        print(f"\n**{task.task.title}**, {n_rows} rows, {options.draws} draws\n")
        print("| score | " + " | ".join(f"prior {p:g}: {c}" for p in PRIORS for c in NAMES.values()) + " |")
        print("|---" * (1 + 2 * len(PRIORS)) + "|")
        for score, values in measured(task, n_rows, options.draws).items():
            cells = [shown(mean_of(values[prior, criterion])) for prior in PRIORS for criterion in NAMES]
            print(f"| {score} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
