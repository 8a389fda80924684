# %% [markdown]
# How biased is the quadratic of a mini-batch, for a network that was trained on scikit-learn's digits?
#
# Claim: a batch of 32 sees its first curvature several times too large, most of its slope is noise, and ten steps of
# conjugate gradients on its quadratic, which promise a decrease, raise the full batch's.
#
#     python examples/06_how_biased_is_a_batch.py [--draws 5] [--epochs 450] [--figure FILE.png]

# %%
import argparse
import warnings

import torch
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import diagnose
from debiased_laplace.demo.digits import EPOCHS, load, train

parser = argparse.ArgumentParser()
parser.add_argument("--draws", type=int, default=5)
parser.add_argument("--epochs", type=int, default=EPOCHS)
parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256])
parser.add_argument("--figure")
options = parser.parse_args()

# %% A trained network
data = load(seed=0)
model = train(data, seed=0, device=torch.device("cpu"), epochs=options.epochs)

# %% Batches of several sizes against all data
diagnosis = diagnose(
    model,
    "classification",
    DataLoader(data.train, batch_size=64),
    batch_sizes=options.sizes,
    n_draws=options.draws,
    prior_precision=40.0,
    progress_bar=True,
)
print(diagnosis)
print(f"{diagnosis.seconds:.0f} seconds")

# %% The picture
if options.figure:
    diagnosis.save_figure(options.figure)
