# %% [markdown]
# The quadratic of a mini-batch and that of all data, in the plane of the batch's two leading eigenvectors.
#
# Claim: in this plane the quadratic of a batch is narrower than that of all data, and its minimum delivers less than
# half of the decrease that it promises. By a split, the curvatures along the same directions are those of all data on
# average.
#
#     python examples/07_quadratic_in_a_plane.py [--draws 20] [--batch 64] [--epochs 60] [--figure FILE.png]

# %%
import argparse
import warnings

import torch
from torch.utils.data import DataLoader, Subset

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import DebiasedLaplace, quadratic_along
from debiased_laplace.demo.digits import load, train

parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=20)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--figure")
options = parser.parse_args()

# %% A network on its way: near the end of training there is no slope left to be wrong about
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)
N = len(data.train)
everything = DataLoader(data.train, batch_size=200)


# %% One draw: a batch, its eigenvectors, and three quadratics in their plane
def drawn(seed):
    """The quadratics of the batch, of another batch and of all data along the batch's leading eigenvectors."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
    a, b = (
        DataLoader(Subset(data.train, part), batch_size=200)
        for part in (order[: options.batch], order[options.batch : 2 * options.batch])
    )
    kind = {"magnitudes": "same_batch", "complement": "none", "rank": 2, "sampling": "uniform"}
    la = DebiasedLaplace(model, "classification", **kind)
    la.fit(a, n_data=N)
    own, other, full = (quadratic_along(model, "classification", s, la.directions) for s in (a, b, everything))
    return own, other, full


draws = [drawn(seed) for seed in range(options.draws)]


# %% The numbers
def shown(values):
    """Mean over draws with its standard error."""
    t = torch.tensor(values, dtype=torch.float64)
    return f"{t.mean():.3g} ± {t.std() / len(t) ** 0.5:.2g}"


share = options.batch / N
print(f"batches of {options.batch} of {N}, mean over {options.draws} draws ± standard error")
for i, name in enumerate(("first", "second")):
    own, other, full = (torch.stack([d[k].curvatures[i] for d in draws]) for k in range(3))
    split = share * own + (1 - share) * other
    print(
        f"{name} eigenvector: curvature on the batch {shown(own.tolist())}, by the split {shown(split.tolist())}, "
        f"on all data {shown(full.tolist())}"
    )
promised, found, best = [], [], []
for own, _, full in draws:
    t = own.minimizer()
    promised.append(own.value - float(own(t)))
    found.append(full.value - float(full(t)))
    best.append(full.value - float(full(full.minimizer())))
print(
    f"decrease at the batch's minimum: promised {shown(promised)}, on all data {shown(found)} (at most {shown(best)})"
)

# %% The picture: the first draw
if options.figure:
    from matplotlib.figure import Figure

    own, _, full = draws[0]
    ends = [q.minimizer() for q in (own, full)]
    reach = 1.6 * max(float(t.abs().max()) for t in ends)
    axis = torch.linspace(-reach, reach, 121, dtype=own.slopes.dtype)
    figure = Figure(figsize=(7.4, 3.7), layout="constrained")
    values = [q.grid(axis, axis).T - q.value for q in (own, full)]
    levels = torch.linspace(float(min(v.min() for v in values)), float(values[1].max()), 16).tolist()
    for axes, v, title in zip(
        figure.subplots(1, 2, sharey=True), values, (f"batch of {options.batch}", f"all {N}"), strict=True
    ):
        axes.contour(axis, axis, v, levels, cmap="viridis", linewidths=1)
        axes.plot(0, 0, "o", color="black", markersize=5, label="weights")
        for end, colour, marker, name in zip(
            ends, ("#D55E00", "#0072B2"), "s^", ("minimum of the batch", "minimum of all data"), strict=True
        ):
            axes.plot(*end, marker, color=colour, markersize=7, label=name, linestyle="none")
        axes.set(title=title, xlabel="along the first eigenvector")
    figure.axes[0].set_ylabel("along the second eigenvector")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(options.figure, dpi=130)
