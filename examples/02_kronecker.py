# %% [markdown]
# Which Kronecker posterior is closest to the full batch, when its curvature comes from 128 of 1,200 samples?
#
# Claim: with so few samples no basis wins everywhere. Row matrices are closer in an input's logits under a weak prior
# and in parameters under a strong one, K-FAC in parameters under a weak one; and the split does not pay, because most
# of the distance is what a Kronecker posterior leaves out, and not the noise of the batch. Averages over draws.
#
#     python examples/02_kronecker.py [--draws 10] [--epochs 450] [--batch 128]

# %%
import argparse
import warnings

import torch
from torch.utils.data import DataLoader, Subset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.demo.digits import EPOCHS, load, train
from debiased_laplace.linalg.low_rank_plus_diagonal import kl_divergence

warnings.filterwarnings("ignore", message="`torch.jit.script")
parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=10)
parser.add_argument("--epochs", type=int, default=EPOCHS)
parser.add_argument("--batch", type=int, default=128)
options = parser.parse_args()
PRIORS = (4.0, 40.0, 400.0)
KINDS = {
    "row_matrices, exact, same_batch": {"kron_basis": "row_matrices", "magnitudes": "same_batch"},
    "row_matrices, exact, held_out": {"kron_basis": "row_matrices", "magnitudes": "held_out"},
    "kfac, exact, same_batch": {"kron_basis": "kfac", "magnitudes": "same_batch"},
    "kfac, exact, held_out": {"kron_basis": "kfac", "magnitudes": "held_out"},
    "kfac, kronecker, same_batch": {
        "kron_basis": "kfac",
        "kron_magnitudes": "kronecker",
        "magnitudes": "same_batch",
    },
    "kfac, kronecker, held_out": {"kron_basis": "kfac", "kron_magnitudes": "kronecker", "magnitudes": "held_out"},
}

# %% A trained network, and the full-batch posterior as the reference
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)
full = DebiasedLaplace(model, "classification", magnitudes="same_batch", complement="none", sampling="uniform")
full.fit(DataLoader(data.train, batch_size=64))
with torch.no_grad():
    jacobians = torch.cat([J for J, _ in full.fit_result.network.jacobians(data.test_inputs[:200])])
reference = {}
for prior in PRIORS:
    full.prior_precision = prior
    reference[prior] = full.posterior_precision, full(data.test_inputs), full.functional_variance(jacobians)


def gaussian_kl(covariance, other):
    """Median over inputs of KL(N(f, covariance) || N(f, other)), in nats."""
    C = torch.linalg.cholesky(covariance.double()), torch.linalg.cholesky(other.double())
    ratio = torch.linalg.solve_triangular(C[1], C[0], upper=False)
    log_dets = [c.diagonal(dim1=-2, dim2=-1).log().sum(-1) for c in C]
    each = 0.5 * (ratio.square().sum((-2, -1)) - covariance.shape[-1]) - log_dets[0] + log_dets[1]
    return float(each.median())


# %% Each draw: the same samples for every posterior
kl = {(kind, prior): [] for kind in KINDS for prior in PRIORS}
tv = {(kind, prior): [] for kind in KINDS for prior in PRIORS}
predictive = {(kind, prior): [] for kind in KINDS for prior in PRIORS}
for draw in range(options.draws):
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(100 + draw))
    samples = Subset(data.train, order[: options.batch].tolist())
    for kind, choice in KINDS.items():
        la = DebiasedLaplace(model, "classification", "all", "kron", seed=draw, sampling="uniform", **choice)
        la.fit(DataLoader(samples, batch_size=64), n_data=len(data.train))
        for prior in PRIORS:
            la.prior_precision = prior
            precision, predictions, covariance = reference[prior]
            kl[kind, prior].append(float(kl_divergence(la.posterior_precision, precision)))
            difference = la(data.test_inputs) - predictions
            tv[kind, prior].append(float(difference.abs().sum(1).mean()) / 2)
            predictive[kind, prior].append(gaussian_kl(covariance, la.functional_variance(jacobians)))


# %% The numbers
def shown(values, digits):
    """Mean and standard deviation over draws."""
    t = torch.tensor(values, dtype=torch.float64)
    return f"{t.mean():.{digits}f} ± {t.std():.{digits}f}"


print(f"{options.batch} of {len(data.train)} samples, mean ± standard deviation over {options.draws} draws")
for prior in PRIORS:
    for kind in KINDS:
        print(
            f"prior precision {prior:g}, {kind}: KL to the full batch {shown(kl[kind, prior], 0)} nats, "
            f"of an input's logits {shown(predictive[kind, prior], 2)}, total variation {shown(tv[kind, prior], 4)}"
        )
