# %% [markdown]
# Fine-tuning a pretrained network: the uncertainty of the weights and the noise
#
# Claim: with few samples the uncertainty of the weights matters for intervals, with many for the tails alone. DeepLC's
# network, its body frozen, gets a new head for the retention times of one run. With 200 peptides (medians of 8 training
# sets) the function has 19 % of the predicted variance; 90 % intervals hold 74 % of 800 test peptides (72 to 77 %) by
# the network alone and 87 % (84 to 90 %) with the posterior. With 2,034 it has 1 %, and 92.8 and 93.4 % are held. Ten
# test peptides are over 3 minutes off: by the log variances alone their NLL makes the mean 3.79, by the posterior,
# which does not take these for known, 1.20 (a constant noise has 1.36, and a CRPS that is larger by a third). The prior
# matters too: under a larger weight decay the noise of 200 peptides is so wide that 98 % are held without a posterior,
# which then makes the CRPS worse. The body may have been trained with other runs of these peptides.
#
#     python examples/13_retention_times.py [--few 200] [--sets 8]

# %%
import argparse
import warnings
from importlib.util import find_spec
from math import log
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate

if find_spec("deeplc") is None:
    raise ModuleNotFoundError("Expected the package deeplc; pip install deeplc==4.5.0.")
import pandas as pd
from deeplc._model_ops import load_model
from deeplc.core import DEFAULT_MODEL
from deeplc.data import DeepLCDataset

warnings.filterwarnings("ignore", message="`torch.jit.script|sigma_noise was not given")  # it is tuned then
parser = argparse.ArgumentParser()
parser.add_argument("--few", type=int, default=200, help="peptides of a small training set")
parser.add_argument("--sets", type=int, default=8, help="small training sets, no two of which share a peptide")
options = parser.parse_args()

# %% Peptides at 1 % false identifications, with the minutes at which the best of their spectra was taken
table = pd.read_csv(DEFAULT_MODEL.parents[1] / "examples" / "example_psms.tsv.gz", sep="\t")
table = table[~table.is_decoy & (table.qvalue < 0.01)].sort_values("score", ascending=False)
# whatever the charge; deeplc skips the modification unless it is a formula
table["peptide"] = table.peptidoform.str.replace(r"/\d+$", "", regex=True)
table["peptide"] = table.peptide.str.replace("[+57.0216]", "[Formula:H3C2NO]", regex=False)
# no two of them have the same sequence
table = table.drop_duplicates("peptide")
minutes = torch.tensor(table.retention_time.to_numpy(), dtype=torch.float32)[:, None]
test, train = torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).tensor_split([800])

# %% The pretrained network but for its heads, one for each of 6,543 setups: 64 features, computed once
network = load_model(DEFAULT_MODEL, device="cpu").requires_grad_(False)
encoding = {name: network.feature_spec[name] for name in ("add_terminal_composition", "legacy_positional_deltas")}
data = DeepLCDataset(list(table.peptide), include_rolling_sum=False, **encoding)
chunks = torch.arange(len(table)).split(256)
features = torch.cat([network.project(*data.encode_batch(chunk.tolist())) for chunk in chunks])


# %% A new head: mean and log variance; its weight decay is the prior of the posterior
def trained(X: Tensor, y: Tensor, weight_decay: float, *, constant_noise: bool) -> nn.Module:
    """Minimize the Gaussian negative log-likelihood, with constant noise the squared error."""
    torch.manual_seed(0)
    head = nn.Linear(X.shape[1], 1 if constant_noise else 2)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=2000, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        mean, s = (head(X), torch.zeros(1)) if constant_noise else head(X).chunk(2, dim=-1)
        decay = weight_decay * sum(p.square().sum() for p in head.parameters())
        total = ((s + (y - mean).square() * (-s).exp()).sum() + decay) / (2 * len(y))
        total.backward()
        return total

    optimizer.step(loss)
    return head.eval()


def results(chosen: Tensor, weight_decay: float, *, constant_noise: bool = False) -> dict[str, float]:
    """Train and fit on the chosen peptides, and return numbers of the test peptides, in minutes."""
    (shift, scale), (center, unit) = ((v[chosen].mean(0), v[chosen].std(0)) for v in (features, minutes))
    X, y = (features - shift) / scale, (minutes - center) / unit
    head = trained(X[chosen], y[chosen], weight_decay, constant_noise=constant_noise)
    name = "regression" if constant_noise else "heteroscedastic"
    la = DebiasedLaplace(head, name, hessian_structure="full", prior_precision=weight_decay)
    la.fit(DataLoader(TensorDataset(X[chosen], y[chosen]), batch_size=256))
    if constant_noise:
        la.optimize_prior_precision(method="marglik")
    p, target = la.predict(X[test]), y[test]
    error, noise_std = (p.mean - target).abs() * unit, p.noise if constant_noise else p.noise_std
    found = {"error": error.mean(), "off": (error > 3).sum(), "noise": noise_std.median() * unit}
    found |= {"function": p.function_std.median() * unit, "share": (p.function_std / p.std).square().median()}
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(X[test], target), batch_size=256), n_resamples=200)
    for name in ("map", "laplace"):
        nll, crps, picp = (report.metrics[name][metric].value for metric in ("nll", "crps", "picp"))
        found |= {f"nll {name}": nll + log(unit), f"crps {name}": crps * unit, f"picp {name}": picp}
    return {name: float(number) for name, number in found.items()}


# %% Few peptides and all of them, under two priors
def report(title: str, sets: list[dict[str, float]]) -> None:
    """Print medians over training sets, with the range of what intervals hold."""
    m = {name: median(found[name] for found in sets) for name in sets[0]}
    print(f"{title}: mean error {m['error']:.2f} min, {m['off']:.0f} of {len(test)} more than 3 min off", end="; ")
    print(f"function {m['function']:.2f} min, noise {m['noise']:.2f} min, share of the variance {m['share']:.0%}")
    for name in ("map", "laplace"):
        picp = sorted(found[f"picp {name}"] for found in sets)
        print(f"  {name}: NLL {m[f'nll {name}']:.2f}, CRPS {m[f'crps {name}']:.3f} min", end=", ")
        print(f"90 % intervals hold {median(picp):.1%} ({picp[0]:.1%} to {picp[-1]:.1%})")


for weight_decay in (10.0, 30.0):
    few = [results(chosen, weight_decay) for chosen in train.split(options.few)[: options.sets]]
    report(f"{options.sets} sets of {options.few} peptides, weight decay {weight_decay:g}", few)
    report(f"{len(train)} peptides, weight decay {weight_decay:g}", [results(train, weight_decay)])
report(f"{len(train)} peptides, constant noise", [results(train, 10.0, constant_noise=True)])
