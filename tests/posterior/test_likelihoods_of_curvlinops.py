"""Binary and positional losses against curvlinops, on networks like those of its and laplace-torch's tests."""

import curvlinops
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace

PRIOR, N = 3.0, 10


class ClassesFirst(nn.Module):
    """Sequences as torch's cross entropy takes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).mT


def vectors(n_outputs):
    return nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, n_outputs)), torch.rand(N, 10).double()


def images(n_outputs):
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 5)
    return nn.Sequential(*layers, nn.LayerNorm(5), nn.Linear(5, n_outputs)), torch.rand(N, 3, 7, 7).double()


def sequences(n_outputs):
    return nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, n_outputs)), torch.rand(N, 4, 3).double()


def pixels(n_outputs):
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, n_outputs, 1, bias=False)
    return nn.Sequential(*layers), torch.rand(N, 2, 3, 2).double()


def labels(n_classes, *shape):
    y = torch.randint(n_classes, (N, *shape))
    y[torch.rand(y.shape) < 0.2] = -100
    return y


def truth(*shape):
    return torch.randint(2, (N, *shape)).double()


BCE, CE = nn.BCEWithLogitsLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum", ignore_index=-100)
CASES = {
    "one label": (lambda: vectors(1), lambda: truth(1), "binary", BCE),
    "three labels": (lambda: vectors(3), lambda: truth(3), "binary", BCE),
    "three labels of images": (lambda: images(3), lambda: truth(3), "binary", BCE),
    "one label of images": (lambda: images(1), lambda: truth(1), "binary", BCE),
    "two labels of tokens": (lambda: sequences(2), lambda: truth(4, 2), "binary", BCE),
    "two labels of pixels": (lambda: pixels(2), lambda: truth(2, 3, 2), "binary", BCE),
    "tokens": (lambda: sequences(3), lambda: labels(3, 4), "classification", CE),
    "pixels": (lambda: pixels(3), lambda: labels(3, 3, 2), "classification", CE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_the_curvature_is_that_of_curvlinops(sampling, case):
    torch.manual_seed(11)
    make, make_targets, likelihood, loss = CASES[case]
    (model, X), y = make(), make_targets()
    model = model.double()
    la = DebiasedLaplace(
        model,
        likelihood,
        hessian_structure="full",
        magnitudes="same_batch",
        sampling=sampling,
        prior_precision=PRIOR,
        temperature=0.7,
    )
    la.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    theirs = ClassesFirst(model) if case == "tokens" else model
    ggn = curvlinops.GGNLinearOperator(theirs, loss, list(theirs.parameters()), [(X, y)])
    P = len(la.mean)
    expected = ggn @ torch.eye(P, dtype=torch.float64) / 0.7 + PRIOR * torch.eye(P).double()
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected.detach(), rtol=1e-6, atol=1e-8)
