# %% [markdown]
# The curvature along each eigenvector of a batch: as the batch sees it, by a split, and on all data.
#
# Claim: along its first eigenvectors a batch sees more curvature than all data have there, along the last ones hundreds
# of times less. By a split, and by cross-fitting, the curvatures are those of all data on average, the first as well as
# the last. Averages over draws.
#
#     python examples/08_curvature_over_eigenvectors.py [--draws 15] [--batch 128] [--epochs 450] [--figure FILE.png]

# %%
import argparse
import warnings

import torch
from torch.utils.data import DataLoader, Subset

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import DebiasedLaplace, directional_derivatives
from debiased_laplace.demo.digits import EPOCHS, load, train

parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=15)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--epochs", type=int, default=EPOCHS)
parser.add_argument("--figure")
options = parser.parse_args()
KINDS = ("same_batch", "held_out", "cross_fitted")

# %% A trained network
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)
N = len(data.train)
everything = DataLoader(data.train, batch_size=200)

# the first ten eigenvectors, and then fewer and fewer
places = torch.cat([torch.arange(1, 11), torch.logspace(1, 4, 61).round().long()]).unique()


# %% One draw: a batch, used in three ways
def drawn(seed):
    """Curvature along eigenvectors: as their own samples see it, as the posterior uses it, and on all data."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
    batch = DataLoader(Subset(data.train, order[: options.batch]), batch_size=200)
    found = {}
    for kind in KINDS:
        how = {"magnitudes": kind, "complement": "none", "sampling": "uniform"}
        la = DebiasedLaplace(model, "classification", prior_precision=40.0, seed=seed, **how)
        la.fit(batch, n_data=N)
        at = places[places <= la.rank] - 1
        full = directional_derivatives(model, "classification", everything, la.directions[:, at]).curvatures
        found[kind] = torch.stack([la.in_sample_curvatures[at].to(full), la.directional_curvatures[at].to(full), full])
    return found


draws = [drawn(seed) for seed in range(options.draws)]
curvatures = {}  # of each kind (draws, 3, places): not every batch has as many directions
for kind in KINDS:
    shortest = min(d[kind].shape[1] for d in draws)
    curvatures[kind] = torch.stack([d[kind][:, :shortest] for d in draws])


# %% The numbers
def over_full(values, full):
    """Ratio of means over draws to the full batch's, with its standard error by linearization."""
    ratio = values.mean() / full.mean()
    return f"{ratio:.3g} ± {(values - ratio * full).std() / full.mean() / len(full) ** 0.5:.2g}"


print(f"batches of {options.batch} of {N}, {options.draws} draws; curvature / all data's along the same eigenvectors")
half = curvatures["held_out"]
rows = {
    f"a half of {options.batch // 2}, as it sees itself": half[:, [0, 2]],
    **{kind: curvatures[kind][:, 1:] for kind in KINDS},
}
for name, values in rows.items():
    used, full = values.unbind(1)
    parts = {"first": slice(0, 1), "first ten": slice(0, 10), f"number {places[used.shape[1] - 1]}": slice(-1, None)}
    print(f"{name}: " + ", ".join(f"{p} {over_full(used[:, s].sum(1), full[:, s].sum(1))}" for p, s in parts.items()))
own, _, full = half.mean(0)
print(f"beyond eigenvector {places[: len(own)][own > full][-1]} a half sees less curvature than all data have")

# %% The picture
if options.figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(KINDS, ("tab:red", "tab:orange", "tab:blue"), strict=True))

    def draw(axes, values, colour, label, style, line=None):
        """The mean over draws and the range of 80 % of them; `line` is drawn instead of the mean."""
        x = places[: values.shape[1]]
        axes.fill_between(x, values.quantile(0.1, 0), values.quantile(0.9, 0), color=colour, alpha=0.2, lw=0)
        axes.plot(x, values.mean(0) if line is None else line, style, color=colour, lw=1.6, label=label)

    draw(left, half[:, 0], colours["same_batch"], "the half that chose them", "-")
    draw(left, half[:, 1], colours["held_out"], "split: the other half", "--")
    draw(left, half[:, 2], "black", "all data", ":")
    for kind, style in zip(KINDS, ("-", "--", "-."), strict=True):
        _, used, full = curvatures[kind].unbind(1)
        draw(right, used / full, colours[kind], kind, style, used.mean(0) / full.mean(0))
    right.axhline(1, color="black", lw=0.8)
    left.set(ylabel="curvature along it (nats per sample)", title=f"eigenvectors of {options.batch // 2} samples")
    right.set(ylabel="curvature used / all data's", title=f"posteriors of {options.batch} samples", ylim=(2e-3, 5))
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="eigenvector, by decreasing curvature on its own samples")
        axes.legend(frameon=False, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.figure, dpi=130)
