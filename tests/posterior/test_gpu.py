"""The whole chain on a GPU, against the same on the CPU."""

import copy

import pytest
import torch
from models import MODELS, targets
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_gpu_equals_cpu(name, solver):
    model, X = MODELS[name]()
    data = TensorDataset(X, targets("classification"))
    found = {}
    for device in ("cpu", "cuda"):
        la = DebiasedLaplace(
            copy.deepcopy(model).to(device),
            "classification",
            rank=5,
            solver=solver,
            complement="diagonal",
            prior_precision=0.4,
        )
        la.fit(DataLoader(data, batch_size=16))
        assert la.directions.device.type == device
        generator = torch.Generator(device=device).manual_seed(1)
        assert la.sample(2, generator).device.type == device
        la.optimize_prior_precision(n_steps=5)
        found[device] = la.directional_curvatures.cpu(), la(X).cpu(), la.log_marginal_likelihood().cpu()
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
