# %% [markdown]
# A small convolutional network, trained from scratch by debiased Newton steps: no learning rate, no schedule.
#
# Claim: no learning rate is needed. Every accepted step lowers the training loss by more than its standard error, as
# samples say that had no part in it, and they adapt the damping; how many steps raise it all the same is printed.
#
#     python examples/04_debiased_newton.py [--steps 100] [--batch 256] [--magnitudes cross_fitted] [--seed 0]

# %%
import argparse
import time
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import DebiasedNewton
from debiased_laplace.demo.digits import network

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--magnitudes", choices=("cross_fitted", "held_out", "same_batch"), default="cross_fitted")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

# %% 1,200 of scikit-learn's digits to train on, the rest to test on
images, labels = load_digits(return_X_y=True)
generator = torch.Generator().manual_seed(options.seed)
order = torch.randperm(len(labels), generator=generator)
X = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)[order]
X, X_test, y, y_test = X[:1200], X[1200:], y[:1200], y[1200:]

model = network(options.seed)


# %%
@torch.no_grad()
def loss_of(inputs, targets):
    """Mean cross entropy."""
    return float(nn.functional.cross_entropy(model(inputs), targets))


optimizer = DebiasedNewton(
    model.parameters(), model, "classification", magnitudes=options.magnitudes, n_data=len(X), seed=options.seed
)
losses, accepted, raised = [loss_of(X, y)], 0, 0
started = time.perf_counter()
for step in range(options.steps):
    some = torch.randperm(len(X), generator=generator)[: options.batch]
    optimizer.step(lambda some=some: (X[some], y[some]))
    losses.append(loss_of(X, y))
    report = optimizer.last_step
    if report.accepted:
        accepted += 1
        raised += losses[-1] - losses[-2] > report.acceptance.standard_error
    if step % 10 == 9:
        print(f"step {step + 1}: training loss {losses[-1]:.4f}, next damping {optimizer.damping:.2g}")

# %%
right = float((model(X_test).argmax(1) == y_test).float().mean())
print(f"training loss {losses[0]:.4f} at the start, {losses[-1]:.4f} after {options.steps} steps of {options.batch}")
print(f"test loss {loss_of(X_test, y_test):.4f}, accuracy {right:.3f}; {time.perf_counter() - started:.0f} s")
print(f"{accepted} steps accepted; {raised} raised the training loss by more than the standard error")
