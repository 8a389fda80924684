# %% [markdown]
# How far is a Laplace posterior from the full batch, when its curvature comes from 128 of 1,200 samples?
#
# Claim: the leading curvatures of a batch are inflated on that batch, the split takes the inflation away, and with a
# diagonal complement its predictions come closer to the full batch's. Averages over draws of the curvature batch.
#
#     python examples/01_same_batch_against_split.py [--draws 10] [--epochs 450] [--figure FILE.svg]

# %%
import argparse
import warnings

import torch
from torch.utils.data import DataLoader, Subset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.demo.comparison import inflation as curvature_ratio
from debiased_laplace.demo.digits import EPOCHS, load, train
from debiased_laplace.linalg.low_rank_plus_diagonal import kl_divergence

warnings.filterwarnings("ignore", message="`torch.jit.script")
parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=10)
parser.add_argument("--epochs", type=int, default=EPOCHS)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--figure")
options = parser.parse_args()
PRIORS = (4.0, 40.0, 400.0)
KINDS = {
    "same_batch": ("same_batch", "none"),
    "same_batch + diagonal": ("same_batch", "diagonal"),
    "held_out": ("held_out", "none"),
    "held_out + diagonal": ("held_out", "diagonal"),
}

# %% A trained network, and the full-batch posterior as the reference
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)
full = DebiasedLaplace(model, "classification", magnitudes="same_batch", complement="none", sampling="uniform")
full.fit(DataLoader(data.train, batch_size=64))
reference = {}
for prior in PRIORS:
    full.prior_precision = prior
    reference[prior] = full.posterior_precision, full(data.test_inputs)


# %% Each draw: the same samples for every posterior
def fitted(magnitudes, complement, samples, seed):
    """A posterior of all the training data, estimated from some samples."""
    kind = {"magnitudes": magnitudes, "complement": complement, "sampling": "uniform"}
    la = DebiasedLaplace(model, "classification", seed=seed, **kind)
    la.fit(DataLoader(Subset(data.train, samples), batch_size=64), n_data=len(data.train))
    return la


kl = {kind: {prior: [] for prior in PRIORS} for kind in KINDS}
tv = {kind: {prior: [] for prior in PRIORS} for kind in KINDS}
inflation = {"same_batch": [], "held_out": []}
for draw in range(options.draws):
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(100 + draw))
    for kind, (magnitudes, complement) in KINDS.items():
        la = fitted(magnitudes, complement, order[: options.batch].tolist(), draw)
        if kind in inflation:
            inflation[kind].append(curvature_ratio(la, full)[:30])
        for prior in PRIORS:
            precision, probabilities = reference[prior]
            la.prior_precision = prior
            kl[kind][prior].append(float(kl_divergence(la.posterior_precision, precision)))
            difference = la(data.test_inputs) - probabilities
            tv[kind][prior].append(float(difference.abs().sum(1).mean()) / 2)


# %% The numbers
def shown(values, digits):
    """Mean and standard deviation over draws."""
    t = torch.tensor(values, dtype=torch.float64)
    return f"{t.mean():.{digits}f} ± {t.std():.{digits}f}"


print(f"{options.batch} of {len(data.train)} samples, mean ± standard deviation over {options.draws} draws")
for kind, ratios in inflation.items():
    ratio = torch.stack(ratios)
    places = ", ".join(
        f"{name} {shown(part.tolist(), 2)}"
        for name, part in (("1st", ratio[:, 0]), ("1st–3rd", ratio[:, :3].mean(1)), ("1st–30th", ratio.mean(1)))
    )
    print(f"curvature used / full batch, {kind}: {places}")
for prior in PRIORS:
    for kind in KINDS:
        print(
            f"prior precision {prior:g}, {kind}: KL to the full batch {shown(kl[kind][prior], 0)} nats, "
            f"total variation {shown(tv[kind][prior], 4)}"
        )

# %% The picture
if options.figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    index = torch.arange(1, 31)
    for (kind, ratios), colour in zip(inflation.items(), ("#D55E00", "#0072B2"), strict=True):
        ratio = torch.stack(ratios)
        spread = 1.96 * ratio.std(0) / len(ratios) ** 0.5
        axes.fill_between(index, ratio.mean(0) - spread, ratio.mean(0) + spread, color=colour, alpha=0.25, lw=0)
        axes.plot(index, ratio.mean(0), color=colour, label=kind)
    axes.axhline(1, color="black", lw=1)
    axes.set(xlabel="direction, by decreasing curvature", ylabel="curvature used / full batch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.figure, metadata={"Date": None} if options.figure.endswith(".svg") else None)
