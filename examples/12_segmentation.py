# %% [markdown]
# Segmentation: rows of uncertain pixels
#
# Claim: a segmentation network is sure of most of its pixels, and where it is sure there is no curvature. Of images
# with two handwritten digits on them, 37 % of the pixels are at the rim of a digit, and 97 % of the drawn rows are
# theirs. A fit takes one forward pass over the images and about 1,000 backward passes, whatever the number of pixels:
# all rows would be over a million. Under this prior, test images are predicted no better than by the network alone.
#
#     python examples/12_segmentation.py [--epochs 12] [--rows 1000]

# %%
import argparse
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate

warnings.filterwarnings("ignore", message="`torch.jit.script")
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--rows", type=int, default=1000)
options = parser.parse_args()

# %% Images of 16 x 20 pixels with two digits each; a pixel is background (0) or part of a digit (1 to 10)
pixels, digits = (torch.tensor(a, dtype=torch.float32) for a in load_digits(return_X_y=True))
pixels, digits = pixels.view(-1, 8, 8) / 16, digits.long()


def composed(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n noisy images (n, 1, 16, 20) and the class of every pixel (n, 16, 20)."""
    g = torch.Generator().manual_seed(seed)
    # even seeds have the first 1,200 digits, odd ones the others
    low, high = (0, 1200) if seed % 2 == 0 else (1200, len(digits))
    images, labels = torch.zeros(n, 16, 20), torch.zeros(n, 16, 20, dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        for left in (0, 10):
            i = int(torch.randint(low, high, (), generator=g))
            top, shift = (int(torch.randint(9 if k == 0 else 3, (), generator=g)) for k in range(2))
            place = slice(top, top + 8), slice(left + shift, left + shift + 8)
            image[place] = pixels[i]
            label[place] = torch.where(pixels[i] > 0.3, digits[i] + 1, 0)
    return (images + 0.1 * torch.randn(images.shape, generator=g))[:, None], labels


# %% A small U-Net, trained as usual
class UNet(nn.Module):
    """One level: images (n, 1, H, W) to logits (n, 11, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(16, 48, 5, padding=2), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU()
        )
        self.up = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 11, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        fine = self.down(x)
        coarse = nn.functional.interpolate(self.inner(max_pool2d(fine, 2)), scale_factor=2)
        return self.up(torch.cat([fine, coarse], dim=1))


X, y = composed(400, seed=0)
test = TensorDataset(*composed(40, seed=1))
torch.manual_seed(0)
model = UNet()
loader = DataLoader(TensorDataset(X, y), batch_size=25, shuffle=True)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(options.epochs):
    for inputs, labels in loader:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
model.eval()

# %% The posterior: rows of pixels, drawn where the curvature is
la = DebiasedLaplace(model, "classification", rank=50, n_rows=options.rows, prior_precision=30.0)
la.fit(DataLoader(TensorDataset(X, y), batch_size=50))
sample, position, _ = la.rows.positions.unbind(1)
is_digit = (y > 0).float()[:, None]
# at the rim: of a 3 x 3 neighbourhood, some pixels are background and others not
rim = (max_pool2d(is_digit, 3, 1, 1) + max_pool2d(1 - is_digit, 3, 1, 1) == 2).flatten(1)
share = rim[sample, position].float().mean()
print(f"{la.rows.n} of {X[:, 0].numel() * 11:,} rows; {share:.0%} of them at the rim of a digit", end=", ")
print(f"as are {rim.float().mean():.0%} of the pixels; {la.rows}")

# %% Test images, by drawn functions; the pixels of an image are one cluster
report = evaluate({"laplace": la}, DataLoader(test, batch_size=20), link_approx="mc", n_resamples=200)
for name, metrics in report.metrics.items():
    nll, ece = metrics["nll"], metrics["ece"]
    print(f"{name}: negative log-likelihood of a pixel {nll.value:.4f} ± {nll.standard_error:.4f}, ECE {ece.value:.4f}")
