# %% [markdown]
# Is a Laplace posterior worth having for a regression network, and where does its spread come from?
#
# Claim: on diabetes, whose targets are mostly noise, the posterior adds about a tenth of the predicted variance, more
# for some patients than for others, and no test set of 155 can tell whether that is better. Each method gets the
# observation noise that suits it best on validation data, so that noise levels are not what is compared. The report
# keeps function and noise apart, and says "no detectable difference" where a bare table would have a winner.
#
#     python examples/03_regression_report.py [--epochs 300] [--folder regression-report]

# %%
import argparse
import warnings
from math import pi

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, calibration_report
from debiased_laplace.calibration import Gaussian

warnings.filterwarnings("ignore", message="`torch.jit.script")
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--folder", default=None, help="write report.html, report.json and report.md there")
options = parser.parse_args()

# %% Standardised targets; 221 patients to train on, 66 to tune the noise, 155 to report on
X, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:221], order[221:287], order[287:]
X = (X - X[train].mean(0)) / X[train].std(0)
centre, unit = y[train].mean(), y[train].std()
y = ((y - centre) / unit)[:, None]

# %% A small network, trained as usual
WEIGHT_DECAY = 0.05
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
loader = DataLoader(TensorDataset(X[train], y[train]), batch_size=64)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=WEIGHT_DECAY)
for _ in range(options.epochs):
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
model.eval()


# %% The observation noise of each method: the best on validation data
def best_noise(mean, variance, targets):
    """Standard deviation of the noise with the smallest negative log-likelihood."""
    grid = torch.linspace(0.3, 1.5, 121)
    total = variance + grid.square()[:, None, None]
    nll = ((targets - mean).square() / total + (2 * pi * total).log()).mean(dim=(1, 2)) / 2
    return float(grid[nll.argmin()])


def predict(inputs):
    """Mean and variance of the function, (n, 1) each: no observation noise in it."""
    mean, covariance = la(inputs)
    return mean.detach(), covariance.detach()[..., 0]


with torch.no_grad():
    sigma_map = best_noise(model(X[validation]), torch.zeros(len(validation), 1), y[validation])
# the prior that the weight decay stands for: it adds WEIGHT_DECAY / 2 |weights|^2 to the mean squared error
prior_precision = WEIGHT_DECAY * len(train) / (2 * sigma_map**2)
la = DebiasedLaplace(model, "regression", sigma_noise=sigma_map, prior_precision=prior_precision)
la.fit(loader)
sigma_laplace = best_noise(*predict(X[validation]), y[validation])
print(f"observation noise: MAP {sigma_map:.2f}, Laplace {sigma_laplace:.2f} standard deviations of the targets")

# %% The report, in units of the targets: the spread of the function and the noise apart
mean, variance = predict(X[test])
report = calibration_report(
    {
        "MAP": (centre + unit * model(X[test]).detach(), unit * torch.full_like(mean, sigma_map)),
        "Laplace": Gaussian(
            centre + unit * mean,
            standard_deviation=unit * variance.sqrt(),
            observation_noise=float(unit * sigma_laplace),
        ),
    },
    centre + unit * y[test],
    task="regression",
    title="Diabetes: disease progression after a year",
    target_unit="points",
)
for method, m in report.metrics.items():
    print(
        f"{method}: NLL {m['nll'].value:.3f} [{m['nll'].low:.3f}, {m['nll'].high:.3f}], "
        f"CRPS {m['crps'].value:.1f}, errors are {m['z_scale'].value:.2f} predicted standard deviations, "
        f"90 % intervals hold {m['picp'].value:.1%}"
    )
function, noise = float(unit * variance.sqrt().mean()), float(unit * sigma_laplace)
print(f"of Laplace's spread, the function: {function:.1f} points, noise: {noise:.1f} points")
spread = (variance + sigma_laplace**2).sqrt()
print(f"widest interval over narrowest: MAP 1.00, Laplace {spread.max() / spread.min():.2f}")
for c in report.comparisons:
    interval = f"[{c.adjusted_low:.4f}, {c.adjusted_high:.4f}]"
    print(f"{c.metric} of {c.method} minus {c.baseline}: {c.difference:.4f} {interval}, {c.verdict}")
if options.folder:
    report.save(options.folder)
