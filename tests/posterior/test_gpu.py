"""The whole chain on a GPU, against the same on the CPU."""

import copy

import pytest
import torch
from models import MODELS, targets
from posterior_cases import posterior_of
from test_positions_of_outputs import made
from torch.utils.data import DataLoader, TensorDataset

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
        la = posterior_of(
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


@pytest.mark.parametrize("subset", ["all", "last_layer", "subnetwork"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_every_structure_and_subset_on_a_gpu_equals_the_cpu(likelihood: str, structure: str, subset: str) -> None:
    model, X = MODELS["convolutions and pooling"]()
    data = TensorDataset(X, targets(likelihood))
    found = {}
    for device in ("cpu", "cuda"):
        la = posterior_of(
            copy.deepcopy(model).to(device),
            likelihood,
            subset,
            structure,
            prior_precision=0.4,
            sigma_noise=0.6 if likelihood == "regression" else 1.0,
            subnetwork_indices=torch.arange(1, 30, 3) if subset == "subnetwork" else None,
        )
        la.fit(DataLoader(data, batch_size=16))
        generator = torch.Generator(device=device).manual_seed(1)
        assert la.sample(2, generator).device.type == device
        predicted = la(X)
        first = predicted[0] if isinstance(predicted, tuple) else predicted
        found[device] = first.cpu(), la.log_marginal_likelihood().detach().cpu()
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [{}, {"directions_dtype": "bfloat16"}, {"directions_device": "cpu"}, {"directions_device": "disk"}],
    ids=str,
)
def test_rows_of_few_parameters_at_a_time_on_a_gpu_equal_the_cpu(options, monkeypatch):
    monkeypatch.setattr("debiased_laplace.posterior.laplace.LEAST", 1)
    monkeypatch.setattr("debiased_laplace.debiasing.memory.CHUNK_BYTES", 0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 200), torch.nn.Tanh(), torch.nn.Linear(200, 3)).double()
    X, n_rows, P = torch.randn(40, 5, dtype=torch.float64), 60, sum(p.numel() for p in model.parameters())
    data = TensorDataset(X, targets("classification", 40))
    found = []
    for device in ("cpu", "cuda"):
        la = posterior_of(
            copy.deepcopy(model).to(device),
            "classification",
            rank=6,
            complement="diagonal",
            prior_precision=0.4,
            sampling="curvature",
            n_rows=n_rows,
            # what vectors of P take, and fewer rows than there are
            memory=6 * 8 * P + n_rows * 8 * 500,
            **options,
        )
        la.fit(DataLoader(data, batch_size=16))
        expected = device if "directions_device" not in options else "cpu"
        assert la.fit_result.estimate.curvature.directions.device.type == expected
        la.optimize_prior_precision(method="gridsearch", val_loader=DataLoader(data, batch_size=9), grid_size=3)
        found.append((la.directional_curvatures.cpu(), la(X).cpu(), la.prior_search.losses))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("structure", ["lowrank", "kron"])
def test_a_network_in_bfloat16_on_a_gpu_agrees_with_the_cpu_within_its_rounding(structure):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).bfloat16()
    X = torch.randn(40, 5).bfloat16()
    data = TensorDataset(X, targets("classification", 40))
    found = []
    for device in ("cpu", "cuda"):
        la = posterior_of(
            copy.deepcopy(model).to(device),
            "classification",
            hessian_structure=structure,
            prior_precision=0.4,
            sampling="curvature",
            n_rows=60,
        )
        la.fit(DataLoader(data, batch_size=16))
        assert la.mean.dtype == torch.float32
        found.append(la._glm_predictive_distribution(X.to(device))[1].cpu())
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


@pytest.mark.parametrize("kind", ["tokens classification", "pixels regression", "tokens heteroscedastic"])
def test_outputs_with_positions_on_a_gpu_equal_the_cpu(kind):
    model, X, y, likelihood = made(kind)
    found = []
    for device in ("cpu", "cuda"):
        la = posterior_of(copy.deepcopy(model).to(device), likelihood, n_rows=60, prior_precision=0.4)
        la.fit(DataLoader(TensorDataset(X, y), batch_size=4))
        predicted = la(X.to(device))
        first = predicted[0] if isinstance(predicted, tuple) else predicted
        found.append((first.cpu(), la.log_marginal_likelihood().detach().cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
