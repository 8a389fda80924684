"""OOD detection, error detection and test NLL of posteriors under the mean-field link.

    python -m benchmarks.uncertainty_scores                  # both parts, five seeds: an hour
    python -m benchmarks.uncertainty_scores --parts tuning --seeds 2 --tasks digits breast_cancer

Scores: AUROC on the digits, mean over seeds of split, training and fit, ± standard error; positives are the inputs out
of distribution or, where a fifth of the training labels was redrawn at random, the misclassified test images.
Tuning: test NLL less that of MAP, paired by sample, under the prior that validation data or the marginal likelihood
choose.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.fidelity_tasks import RECIPES, Recipe, trained
from debiased_laplace import DebiasedLaplace
from debiased_laplace.calibration.metrics.detection import combine_scores
from debiased_laplace.calibration.metrics.out_of_distribution import COMBINED

POSTERIORS = {
    "all weights, 128 samples": ("all", "lowrank", 128),
    "last layer, all samples": ("last_layer", "full", None),
}
MOST_VALIDATION, MOST_TEST = 200, 800
GRID = {"log_prior_prec_min": -1.0, "log_prior_prec_max": 5.0, "grid_size": 13}
Scores = dict[str, Tensor]
Table = dict[tuple[str, ...], list[float]]


class Problem:
    """A trained network with validation and test data; some classes may be left out, some training labels be wrong."""

    def __init__(self, recipe: Recipe, seed: int, without: tuple[int, ...] = (), wrong: float = 0.0):
        assert recipe.labelled is not None
        (X, y, _), rest = recipe.data(seed), recipe.labelled(seed)
        kept, kept_of_rest = (~torch.isin(labels, torch.tensor(without)) for labels in (y, rest[1]))
        self.left_out = rest[0][~kept_of_rest]
        X, y = X[kept], y[kept]
        generator = torch.Generator().manual_seed(seed)
        changed = torch.rand(len(y), generator=generator) < wrong
        y[changed] = torch.randint(int(y.max()) + 1, (int(changed.sum()),), generator=generator)
        inputs, labels = (t[kept_of_rest] for t in rest)
        half = min(len(inputs) // 2, MOST_VALIDATION)
        self.train = TensorDataset(X, y)
        self.validation = TensorDataset(inputs[:half], labels[:half])
        self.test = inputs[half : half + MOST_TEST], labels[half : half + MOST_TEST]
        self.model = trained(recipe, X, y, seed).eval()
        self.seed = seed

    def posterior(self, kind: str) -> Any:
        """A fitted posterior."""
        subset, structure, n = POSTERIORS[kind]
        la = DebiasedLaplace(self.model, "classification", subset, structure, seed=self.seed, sampling="uniform")
        samples = self.train if n is None else Subset(self.train, range(n))
        la.fit(DataLoader(samples, batch_size=256), n_data=len(self.train))
        return la

    def tune(self, la: Any, method: str, link: str = "mean_field") -> None:
        """Set the prior precision that a method chooses."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if method == "marginal likelihood":
                la.optimize_prior_precision()
            else:
                loader = DataLoader(self.validation, batch_size=1000)
                la.optimize_prior_precision(method="gridsearch", val_loader=loader, link_approx=link, **GRID)

    @torch.no_grad()
    def map_probabilities(self, inputs: Tensor) -> Tensor:
        """Those of the network alone."""
        return self.model(inputs).softmax(-1)


def out_of_distribution(problem: Problem) -> dict[str, Tensor]:
    """Sets out of distribution for the digits, classes that training left out among them."""
    inputs = problem.test[0]
    generator = torch.Generator().manual_seed(problem.seed)
    order = torch.randperm(inputs[0].numel(), generator=generator)
    return {
        "scrambled": inputs.flatten(1)[:, order].reshape(inputs.shape),
        "five times": 5 * inputs,
        "noise": torch.rand(inputs.shape, generator=generator),
        **({"left-out classes": problem.left_out} if len(problem.left_out) else {}),
    }


def scores_of(la: Any, inputs: Tensor) -> Scores:
    """All scores of a posterior that need no other inputs."""
    logits = la.gaussian_logits(inputs)
    p, information = logits.probabilities_and_information()
    return {
        "mutual_information": information,
        "logit_variance": logits.total_variance,
        "entropy": torch.special.entr(p).sum(1),
        "max_probability": 1 - p.max(1).values,
    }


def areas(inside: Scores, outside: Scores) -> dict[str, float]:
    """AUROC of every score, and of the conformal one."""
    pairs = {name: (values, outside[name]) for name, values in inside.items()}
    if all(name in pairs for name in COMBINED):
        pairs = {"conformal": combine_scores([pairs[name] for name in COMBINED]), **pairs}
    return {
        name: float(roc_auc_score([0] * len(a) + [1] * len(b), torch.cat([a, b]).double()))
        for name, (a, b) in pairs.items()
    }


def scores(n_seeds: int, tasks: list[str]) -> None:  # noqa: ARG001
    """AUROC of every score, by posterior, prior and set."""
    found: Table = defaultdict(list)
    priors: Table = defaultdict(list)
    digits = RECIPES["digits"]
    for seed in range(n_seeds):
        plain, fewer = Problem(digits, seed), Problem(digits, seed, without=(8, 9))
        noisy = Problem(replace(digits, epochs=150), seed, wrong=0.2)
        for problem, sets in ((plain, slice(0, 3)), (fewer, slice(3, 4)), (noisy, slice(0, 0))):
            outside = dict(list(out_of_distribution(problem).items())[sets])
            inputs, labels = problem.test
            p = problem.map_probabilities(inputs)
            wrong = p.argmax(1) != labels
            of_map = _map_scores(p)
            for name, others in outside.items():
                for score, area in areas(of_map, _map_scores(problem.map_probabilities(others))).items():
                    found["MAP", "", name, score].append(area)
            if problem is noisy:
                for score, area in areas(*_split(of_map, wrong)).items():
                    found["MAP", "", "errors", score].append(area)
            for kind in POSTERIORS:
                la = problem.posterior(kind)
                for prior in ("1", "10", "marginal likelihood", "validation"):
                    if prior in ("1", "10"):
                        la.prior_precision = float(prior)
                    else:
                        problem.tune(la, prior)
                        priors[kind, prior].append(float(la.prior_precision))
                    ours = scores_of(la, inputs)
                    for name, others in outside.items():
                        for score, area in areas(ours, scores_of(la, others)).items():
                            found[kind, prior, name, score].append(area)
                    if problem is noisy:
                        for score, area in areas(*_split(ours, wrong)).items():
                            found[kind, prior, "errors", score].append(area)
        print(f"seed {seed} done", flush=True)
    sets_shown = ["scrambled", "five times", "noise", "left-out classes", "errors"]
    print("| posterior | prior precision | score | " + " | ".join(sets_shown) + " |\n" + "|---" * 8 + "|")
    for kind, prior, score in dict.fromkeys((k[0], k[1], k[3]) for k in found):
        shown = [_shown(found[kind, prior, name, score], 3) for name in sets_shown]
        print(f"| {kind} | {prior} | {score} | " + " | ".join(shown) + " |")
    for (kind, prior), values in priors.items():
        print(f"{kind}, {prior}: prior precisions from {min(values):.3g} to {max(values):.3g}")


def _map_scores(p: Tensor) -> Scores:
    return {"entropy": torch.special.entr(p).sum(1), "max_probability": 1 - p.max(1).values}


def _split(values: Scores, wrong: Tensor) -> tuple[Scores, Scores]:
    return tuple({name: v[chosen] for name, v in values.items()} for chosen in (~wrong, wrong))  # type: ignore[return-value]


def tuning(n_seeds: int, tasks: list[str]) -> None:
    """Test NLL less MAP's after tuning, by task, posterior, method and link."""
    found: Table = defaultdict(list)
    for seed in range(n_seeds):
        for name in tasks:
            recipe = RECIPES[name]
            problem = Problem(recipe, seed)
            inputs, labels = problem.test
            of_map = _losses(problem.map_probabilities(inputs), labels)
            for kind in POSTERIORS:
                la = problem.posterior(kind)
                for method, link in (
                    ("validation", "mean_field"),
                    ("validation", "probit"),
                    ("marginal likelihood", "mean_field"),
                    ("marginal likelihood", "probit"),
                ):
                    if (method, link) != ("marginal likelihood", "probit"):  # it knows no link
                        problem.tune(la, method, link)
                    losses = _losses(la(inputs, link_approx=link), labels)
                    difference = losses - of_map
                    error = float(difference.std()) / len(difference) ** 0.5
                    found[recipe.title, kind, method, link].append(float(difference.mean()))
                    print(
                        f"seed {seed}, {name}, {kind}, {method}, {link}: prior {float(la.prior_precision):.3g}, NLL "
                        f"{float(losses.mean()):.4f}, less MAP's {float(difference.mean()):+.4f} ± {error:.4f}",
                        flush=True,
                    )
    print("| task | posterior | prior precision by | mean_field | probit |\n|---|---|---|---|---|")
    for title, kind, method in dict.fromkeys(key[:3] for key in found):
        shown = [_shown(found[title, kind, method, link], 4, sign="+") for link in ("mean_field", "probit")]
        print(f"| {title} | {kind} | {method} | " + " | ".join(shown) + " |")


def _losses(p: Tensor, labels: Tensor) -> Tensor:
    return -p.detach().double().gather(1, labels[:, None])[:, 0].clamp_min(1e-38).log()


def _shown(values: list[float], digits: int, sign: str = "") -> str:
    if not values:
        return "–"
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}"


TASKS = [name for name, recipe in RECIPES.items() if recipe.labelled is not None]
PARTS: dict[str, Callable[[int, list[str]], None]] = {"scores": scores, "tuning": tuning}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of the tuning")
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options.seeds, options.tasks)


if __name__ == "__main__":
    main()
