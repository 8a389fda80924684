"""The tasks of the benchmarks of Newton steps: data, network, and checkpoints of its usual training.

Training labels are partly wrong in both, test labels are right.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fidelity_tasks import N_CLASSES, RECIPES, trained
from debiased_laplace.demo.digits import load, network, train

N_TEST = 1000  # of 30_classes
EPOCHS = {
    "digits": {"early": 1, "middle": 20, "late": 450},
    "30_classes": {"early": 1, "middle": 15, "late": 150},
}
TASKS = {"digits": "Digits CNN", "30_classes": "30 classes, label noise"}
CHECKPOINTS = ("early", "middle", "late")


@dataclass(frozen=True, eq=False)
class NewtonTask:
    """Data, and a network to be trained on it.

    Attributes:
        train: inputs and labels, a fifth of them wrong.
        test: inputs and right labels.
        network: not trained, the same for the same seed.
        trained: after so many epochs of the task's usual training.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    network: Callable[[], nn.Module]
    trained: Callable[[int], nn.Module]


def newton_task(name: str, seed: int) -> NewtonTask:
    """The task with its data and its initial weights drawn by the seed."""
    if name == "digits":
        data = load(seed)
        X, y = data.train.tensors
        return NewtonTask(
            (X, y),
            (data.test_inputs, data.test_targets),
            lambda: network(seed),
            lambda epochs: train(data, seed, torch.device("cpu"), epochs),
        )
    recipe = RECIPES[name]
    X, y, _ = recipe.data(seed)
    # the task has too few test samples of its own for a loss
    new = torch.randn(N_TEST, 25, generator=torch.Generator().manual_seed(10_000 + seed))

    def initial() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return recipe.network()

    return NewtonTask(
        (X, y),
        (new, labels_of_many_classes(new, seed)),
        initial,
        lambda epochs: trained(replace(recipe, epochs=epochs), X, y, seed),
    )


def labels_of_many_classes(X: Tensor, seed: int) -> Tensor:
    """What the random network of 30_classes says, none of it wrong."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(2060, 25, generator=generator)  # the task's own inputs are drawn before its network
    first, second = (torch.randn(shape, generator=generator) for shape in ((25, 64), (64, N_CLASSES)))
    return (torch.tanh(X @ first / 25**0.5) @ second).argmax(1)


def checkpoint(folder: Path, task: str, name: str, seed: int) -> nn.Module:
    """The task's network after the checkpoint's epochs, trained once and kept in the folder."""
    path = folder / f"{name}-{seed}.pt"
    recipe = newton_task(task, seed)
    if path.exists():
        model = recipe.network()
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = recipe.trained(EPOCHS[task][name])
        torch.save(model.state_dict(), path)
    return model.eval()
