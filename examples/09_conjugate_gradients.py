# %% [markdown]
# Conjugate gradients on a batch: what they believe, what they do on all data, and what a split changes.
#
# Claim: every iteration on one batch promises a further decrease of the quadratic, while that of all data goes up by as
# much. With steps from another half than the directions it goes up by a small part of that; cross-fitted and shrunk it
# stays below the start, though far above what conjugate gradients on all data reach. Averages over draws.
#
#     python examples/09_conjugate_gradients.py [--draws 20] [--batch 128] [--epochs 60] [--figure FILE.png]

# %%
import argparse
import warnings

import torch

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import Regularizer, newton_step, quadratic_along
from debiased_laplace.demo.digits import load, train

parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=20)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--figure")
options = parser.parse_args()
ITERATIONS, DAMPING = 20, 1e-3

# %% A network on its way, and the regularizer that it is trained with: weight decay 1e-4
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)
X, y = data.train.tensors
regularizer = Regularizer(prior_precision=1e-4 * len(X), n_data=len(X))


# %% Steps, and what quadratics say along their way
def step_of(samples, magnitudes, shrinkage, seed=0):
    """A step that goes on to the last iteration, one direction at a time."""
    options = {"max_iterations": ITERATIONS, "regularizer": regularizer, "stopping": "none"}
    options |= {"n_data": len(X), "seed": seed}
    return newton_step(model, "classification", samples, DAMPING, magnitudes, shrinkage=shrinkage, **options)


def way(passes):
    """Where the average of some passes is after each iteration, (P, iterations)."""
    ends = [(p.directions.double() * p.step_lengths).cumsum(1) for p in passes]
    ends = [torch.nn.functional.pad(e, (0, ITERATIONS - e.shape[1]), "replicate") for e in ends]  # converged early
    return sum(ends) / len(ends)


def change(samples, passes):
    """Of the quadratic of some samples, before the first and after each iteration."""
    q = quadratic_along(model, "classification", samples, way(passes).float(), regularizer=regularizer)
    values = q(torch.eye(ITERATIONS, dtype=torch.float64)) - q.value
    return torch.cat([values.new_zeros(1), values])


best = change((X, y), step_of((X, y), "same_batch", shrinkage=False).passes)
changes = {}
for seed in range(options.draws):
    some = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[: options.batch]
    single = step_of((X[some], y[some]), "same_batch", shrinkage=False).passes
    found = {"same_batch": change((X, y), single), "same_batch believes": change((X[some], y[some]), single)}
    for shrinkage, text in ((False, ""), (True, ", shrinkage")):
        step = step_of((X[some], y[some]), "cross_fitted", shrinkage, seed)
        # with the same seed, a held-out step is the first pass of a cross-fitted one
        found[f"held_out{text}"] = change((X, y), step.passes[:1])
        found[f"cross_fitted{text}"] = change((X, y), step.passes)
    for name, values in found.items():
        changes.setdefault(name, []).append(values)
changes = {name: torch.stack(values) for name, values in changes.items()}


# %% The numbers
def shown(values):
    """Mean over draws with its standard error."""
    return f"{values.mean():+.3f} ± {values.std() / len(values) ** 0.5:.3f}"


print(f"batches of {options.batch} of {len(X)}, mean over {options.draws} draws ± standard error")
for name, values in changes.items():
    at = ", ".join(f"{shown(values[:, i])} after {i}" for i in (1, 5, ITERATIONS))
    above = int((values[:, -1] > 0).sum())
    print(f"{name}: change of the quadratic {at}; above the start at the end in {above} of {options.draws} draws")
print(f"all data: change of the quadratic {', '.join(f'{best[i]:+.3f} after {i}' for i in (1, 5, ITERATIONS))}")

# %% The picture
if options.figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(right)

    def draw(axes, name, colour, style, label):
        """The mean over draws and the range of 80 % of them."""
        values = changes[name]
        x = range(values.shape[1])
        axes.fill_between(x, values.quantile(0.1, 0), values.quantile(0.9, 0), color=colour, alpha=0.2, lw=0)
        axes.plot(x, values.mean(0), style, color=colour, lw=1.6, label=label)

    draw(left, "same_batch", "tab:red", "-", "same_batch, on all data")
    draw(left, "same_batch believes", "tab:red", "--", "same_batch, on its batch")
    for axes, method, colour in ((middle, "held_out", "tab:orange"), (right, "cross_fitted", "tab:blue")):
        draw(axes, method, colour, "--", method)
        draw(axes, f"{method}, shrinkage", colour, "-", f"{method}, shrinkage")
    titles = "directions and steps: one batch", "on all data, steps: the other half", "on all data, both ways averaged"
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.plot(best, "-.", color="black", lw=1.6, label="conjugate gradients on all data")
        axes.axhline(0, color="grey", lw=0.8)
        axes.set(xlabel="iterations", xticks=range(0, ITERATIONS + 1, 5))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left" if axes is left else "lower left")
    left.set(ylabel="change of the quadratic (nats per sample)", ylim=(None, 2.3))
    figure.savefig(options.figure, dpi=130)
