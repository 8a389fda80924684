# %% [markdown]
# Why is the quadratic of a mini-batch biased? Random matrices whose full batch is known.
#
# Claim: along the leading eigenvectors of a batch, its curvature is larger than the full batch's along the same
# directions, along the trailing ones smaller, and steeper along its own gradient; another batch, with the first one's
# known share of all samples put back, shows the full batch's values on average.
#
#     python examples/05_regression_to_the_mean.py [--draws 400] [--figure FILE.png]

# %%
import argparse

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=400)
parser.add_argument("--figure")
options = parser.parse_args()
N, P, BATCHES = 2000, 60, (64, 128, 256, 512)
torch.set_default_dtype(torch.float64)

# %% The full batch: a linear regression with N samples, of which everything is known
generator = torch.Generator().manual_seed(0)
spectrum = torch.arange(1, P + 1).pow(-1.0)  # decays as a network's curvature does, only more slowly
X = torch.randn(N, P, generator=generator) * spectrum.sqrt()
residuals = 0.5 * torch.randn(N, generator=generator) + X @ (0.2 * torch.randn(P, generator=generator))
gradients = residuals[:, None] * X  # of the squared error, per sample
H, g = X.T @ X / N, gradients.mean(0)
covariance = (gradients - g).square().sum() / N  # trace of the gradients' covariance


# %% One draw: a batch in two halves
def measured(batch, seed):
    """Directions of a batch, and what this batch, another one and all samples say along them."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    own, other = order[:batch], order[batch : 2 * batch]
    H_own, H_other = (X[i].T @ X[i] / batch for i in (own, other))
    U = torch.linalg.eigh(H_own).eigenvectors.flip(1)
    curvatures = [((U.T @ M) * U.T).sum(1) for M in (H_own, H_other, H)]
    p = -gradients[own].mean(0)
    slopes = [(p @ gradients[own].mean(0)), (p @ gradients[other].mean(0)), (p @ g)]
    curvatures, slopes = torch.stack([*curvatures, curvatures[1]]), torch.stack(slopes)
    share = batch / N  # the other batch is drawn from what the first one left
    curvatures[1], slopes[1] = (share * x[0] + (1 - share) * x[1] for x in (curvatures, slopes))
    return curvatures, slopes


results = {}
for batch in BATCHES:
    draws = [measured(batch, seed) for seed in range(options.draws)]
    results[batch] = torch.stack([c for c, _ in draws]), torch.stack([s for _, s in draws])


# %% The numbers
def shown(values):
    """Mean and standard error over draws."""
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def over_full(values, draws):
    """Ratio of means to the full batch's value along the same directions, with its standard error by linearization."""
    ratio = values.mean() / draws.mean()
    return f"{ratio:.3f} ± {(values - ratio * draws).std() / draws.mean().abs() / len(draws) ** 0.5:.3f}"


print(f"{options.draws} draws from {N} samples, {P} parameters; value / full batch along the same directions ± se")
for batch, (curvatures, slopes) in results.items():
    for place, chosen in (("first", slice(0, 1)), ("last ten", slice(P - 10, P))):
        own, split, full, other = curvatures[:, :, chosen].mean(2).T
        print(f"batch {batch}, {place}: same batch {over_full(own, full)}, split {over_full(split, full)}")
    print(f"batch {batch}, last ten, the other batch alone: {over_full(other, full)}")
    own, split, full = slopes.T
    print(f"batch {batch}, slope: same batch {over_full(own, full)}, split {over_full(split, full)}")
    expected = g.square().sum() + covariance / batch * (N - batch) / (N - 1)
    print(f"batch {batch}, squared norm of its gradient: {shown(-own)}, by the formula {expected:.3f}")

correlation = torch.corrcoef(results[BATCHES[0]][0][:, :2, 0].T)[0, 1]
print(f"batch {BATCHES[0]}, first: correlation of same batch and split over draws {correlation:.2f}")

# %% The picture
if options.figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    index, shown_batch = torch.arange(1, P + 1), BATCHES[0]
    looks = (("same batch", "#D55E00"), ("split", "#0072B2"), ("all samples", "black"))
    for k, (label, colour) in enumerate(looks):
        values = results[shown_batch][0][:, k]
        low, high = values.quantile(0.1, 0), values.quantile(0.9, 0)
        left.plot(index, values.mean(0), color=colour, label=label, lw=1.4, ls=":" if k == 2 else "-")
        if k < 2:
            left.fill_between(index, low, high, color=colour, alpha=0.2, lw=0)
    left.set(xscale="log", yscale="log", xlabel="eigenvector of the batch", ylabel="curvature along it")
    left.set_title(f"batch of {shown_batch}: mean and 80 % of draws", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    first = results[shown_batch][0][:, :2, 0]
    middle.scatter(*first.T, s=7, color="#0072B2", alpha=0.5, lw=0)
    ends = [float(first.min()), float(first.max())]
    middle.plot(ends, ends, color="black", lw=1)
    middle.set(xlabel="curvature on the batch that chose the direction", ylabel="curvature by the split")
    middle.set_title("first eigenvector, one point per draw", fontsize=9)
    for place, style in ((0, "-"), (P - 1, "--")):
        for k, (label, colour) in enumerate(looks[:2]):
            ratio = [float(c[:, k, place].mean() / c[:, 2, place].mean()) for c, _ in results.values()]
            name = f"{'first' if place == 0 else 'last'}, {label}"
            right.plot(BATCHES, ratio, style, color=colour, marker="o", ms=4, label=name)
    right.axhline(1, color="black", lw=1)
    right.set(xscale="log", xlabel="samples in the batch", ylabel="curvature / full batch")
    right.set_xticks(BATCHES, [str(b) for b in BATCHES], minor=False)
    right.minorticks_off()
    right.legend(frameon=False, fontsize=7, handlelength=3.5)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.figure, dpi=130)
