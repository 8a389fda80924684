# %% [markdown]
# Laplace posteriors of 128 of 1,200 samples against that of all: how uncertain they are about test images.
#
# Claim: with magnitudes from other samples than the directions', the standard deviations on test images and the
# predictions come closer to the full batch's under a weak and a moderate prior, most so with cross-fitting. Under a
# strong prior cross-fitting hardly matters, and the plain split loses. Only `magnitudes` differs; averages over draws.
#
#     python examples/10_laplace_against_the_full_batch.py [--draws 8] [--batch 128] [--epochs 450] [--figure FILE.png]

# %%
import argparse
import warnings

import torch
from torch.utils.data import DataLoader, Subset

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import DebiasedLaplace
from debiased_laplace.demo.digits import EPOCHS, load, train
from debiased_laplace.linalg.low_rank_plus_diagonal import kl_divergence

parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=8)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--epochs", type=int, default=EPOCHS)
parser.add_argument("--figure")
options = parser.parse_args()
KINDS, PRIORS = ("same_batch", "held_out", "cross_fitted"), (4.0, 40.0, 400.0)

# %% A trained network, and the full-batch posterior as the reference
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)
N, X = len(data.train), data.test_inputs[:300]
full = DebiasedLaplace(model, "classification", magnitudes="same_batch", complement="none", sampling="uniform")
full.fit(DataLoader(data.train, batch_size=64))

# by how much the first class leads the second: unlike a single output's, its variance is what predictions depend on
with torch.no_grad():
    jacobians = torch.cat([J for J, _ in full.fit_result.network.jacobians(X)])
    first, second = model(X).topk(2, -1).indices.T
    every = torch.arange(len(X))
    leads = (jacobians[every, first] - jacobians[every, second])[:, None]


def deviations(la):
    """Standard deviation of the lead on each test image, in nats."""
    return la.functional_variance(leads).flatten().sqrt().double()


reference = {}
for prior in PRIORS:
    full.prior_precision = prior
    reference[prior] = full.posterior_precision, full(X), deviations(full)

# %% Each draw: the same samples for every posterior
found = {(kind, prior): [] for kind in KINDS for prior in PRIORS}
spread = {key: [] for key in found}
for draw in range(options.draws):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(100 + draw)).tolist()
    batch = DataLoader(Subset(data.train, order[: options.batch]), batch_size=64)
    for kind in KINDS:
        la = DebiasedLaplace(model, "classification", magnitudes=kind, seed=draw, sampling="uniform")
        la.fit(batch, n_data=N)
        for prior in PRIORS:
            la.prior_precision = prior
            precision, predictions, expected = reference[prior]
            spread[kind, prior].append(deviations(la))
            kl = float(kl_divergence(la.posterior_precision, precision))
            total_variation = float((la(X) - predictions).abs().sum(1).mean()) / 2
            ratio = spread[kind, prior][-1] / expected
            found[kind, prior].append((kl, total_variation, float(ratio.mean()), float((ratio - 1).abs().mean())))


# %% The numbers
def shown(values, digits):
    """Mean over draws with its standard error."""
    return f"{values.mean():.{digits}f} ± {values.std() / len(values) ** 0.5:.{digits}f}"


found = {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}
print(f"{options.batch} of {N} samples, mean over {options.draws} draws ± standard error; {len(X)} test images")
for prior in PRIORS:
    for kind in KINDS:
        kl, tv, ratio, error = found[kind, prior].T
        print(
            f"prior precision {prior:g}, {kind}: KL to the full batch {shown(kl, 1)} nats, "
            f"total variation {shown(tv, 4)}, standard deviation / full batch's {shown(ratio, 3)}, "
            f"off by {shown(100 * error, 1)} %"
        )

# %% The picture
if options.figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    looks = dict(zip(KINDS, (("tab:red", "s"), ("tab:orange", "o"), ("tab:blue", "^")), strict=True))
    for kind in ("same_batch", "cross_fitted"):
        colour, marker = looks[kind]
        mean = torch.stack(spread[kind, 40.0]).mean(0)
        left.scatter(reference[40.0][2], mean, s=10, marker=marker, color=colour, alpha=0.6, lw=0)
    ends = [float(f(reference[40.0][2])) for f in (torch.min, torch.max)]
    left.plot(ends, ends, color="black", lw=1)
    left.set(xlabel=f"posterior of all {N:,} samples (nats)", ylabel=f"posterior of {options.batch} samples (nats)")
    left.set_title("standard deviation, prior precision 40", fontsize=10)
    for axes, column, title in ((middle, 0, "KL to the full batch"), (right, 1, "total variation of predictions")):
        axes.axhline(1, color="black", lw=0.8)
        for (kind, (colour, marker)), shift in zip(looks.items(), (-0.22, 0, 0.22), strict=True):
            for place, prior in enumerate(PRIORS):
                values = found[kind, prior][:, column] / found["same_batch", prior][:, column].mean()
                axes.plot([place + shift] * len(values), values, marker, color=colour, ms=4, alpha=0.4, mew=0)
                label = kind if axes is right and place == 0 else None
                axes.plot(place + shift, values.mean(), marker, color=colour, ms=8, mec="white", label=label)
        axes.set(ylim=(0, None), xlabel="prior precision", ylabel="relative to same_batch's mean")
        axes.set_xticks(range(len(PRIORS)), [f"{p:g}" for p in PRIORS])
        axes.set_title(title, fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(options.figure, dpi=130)
