"""Data and network of the demo.

A fifth of the training labels is replaced at random. Trained on the clean digits, the network is calibrated and no
posterior improves it; trained with wrong labels it is overconfident, as networks in use often are.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from tqdm import tqdm

N_TRAIN, N_CURVATURE, N_HELD_OUT = 1200, 128, 256
WRONG_LABELS = 0.2
EPOCHS = 450


@dataclass(frozen=True, eq=False)
class Digits:
    """Split of scikit-learn's digits; some training labels are wrong, the test labels are correct.

    Attributes:
        train: training images and labels.
        test_inputs: test images.
        test_targets: test labels.
        curvature: training samples for the curvature of the two mini-batch posteriors.
        held_out: other training samples, for the held-out KL.
    """

    train: TensorDataset
    test_inputs: Tensor
    test_targets: Tensor
    curvature: Subset[tuple[Tensor, ...]]
    held_out: Subset[tuple[Tensor, ...]]

    @property
    def test(self) -> TensorDataset:
        """Test images with their labels."""
        return TensorDataset(self.test_inputs, self.test_targets)

    @property
    def scrambled(self) -> Tensor:
        """Test images with one random permutation of the pixels: out of distribution, with the brightness of digits."""
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        return self.test_inputs.flatten(1)[:, order].reshape(self.test_inputs.shape)


def load(seed: int) -> Digits:
    """Split the 1,797 images: 1,200 for training, of which 128 for the curvature, and the rest for the test."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=generator)
    X = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    noisy = y[:N_TRAIN].clone()
    wrong = torch.rand(N_TRAIN, generator=generator) < WRONG_LABELS
    noisy[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    train = TensorDataset(X[:N_TRAIN], noisy)
    shuffled = torch.randperm(N_TRAIN, generator=generator).tolist()
    return Digits(
        train,
        X[N_TRAIN:],
        y[N_TRAIN:],
        Subset(train, shuffled[:N_CURVATURE]),
        Subset(train, shuffled[N_CURVATURE : N_CURVATURE + N_HELD_OUT]),
    )


def network(seed: int) -> nn.Module:
    """Return an untrained convolutional network of 3,254 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 10, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(10, 24, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 10),
        )


def train(data: Digits, seed: int, device: torch.device, epochs: int = EPOCHS) -> nn.Module:
    """Train the network until it has memorized many of the wrong labels."""
    model = network(seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    X, y = (t.to(device) for t in data.train.tensors)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(range(epochs), desc="[Training]", leave=False, disable=None) as bar:
        for _ in bar:
            for batch in torch.randperm(len(X), generator=generator).split(64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(X[batch]), y[batch])
                loss.backward()
                optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model
