"""`debiased-laplace evaluate`: the report of stored posteriors is that of `evaluate`."""

import json
import sys

import pytest
import torch
from laplace.curvature import CurvlinopsEF, CurvlinopsHessian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import CalibrationReport, DebiasedLaplace, evaluate
from debiased_laplace.cli import main

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def samples(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def test():
    return DataLoader(TensorDataset(*samples(1, 50)), batch_size=20)


def noise():
    return DataLoader(TensorDataset(*samples(2, 30)), batch_size=20)


def nothing():
    return None
"""
NAMES = ["--model", "evaluated_by_the_user:model", "--weights", "weights.pt", "--loader", "evaluated_by_the_user:test"]
OPTIONS = ["--device", "cpu", "--no-progress", "--n-resamples", "20", "--format", "json", "--out", "out"]


def samples(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def posterior(model, subset="all", **options):
    la = DebiasedLaplace(model, "classification", subset, **{"prior_precision": 0.4, "temperature": 1.3, **options})
    la.fit([samples(0, 40)])
    return la


@pytest.fixture
def posteriors(tmp_path, monkeypatch):
    """Posteriors of one network, and their states in the working directory."""
    (tmp_path / "evaluated_by_the_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.save(model.state_dict(), "weights.pt")
    torch.save(torch.arange(2, 30, 3), "indices.pt")
    found = {
        "all": posterior(model),
        "last": posterior(model, "last_layer", hessian_structure="kron"),
        "part": posterior(model, "subnetwork", subnetwork_indices=torch.arange(2, 30, 3), rank=4),
    }
    for name, la in found.items():
        torch.save(la.state_dict(), f"{name}.pt")
    yield found
    sys.modules.pop("evaluated_by_the_user", None)


def numbers(report):
    return {method: {name: e.value for name, e in metrics.items()} for method, metrics in report.metrics.items()}


def test_the_report_is_that_of_the_same_posteriors_in_python(posteriors, tmp_path, capsys):
    states = ["--state", *(f"{name}.pt" for name in posteriors), "--subnetwork-indices", "indices.pt"]
    away = ["--ood-loader", "noise=evaluated_by_the_user:noise"]
    assert main(["evaluate", *NAMES, *states, *away, *OPTIONS, "--seed", "3"]) == 0
    assert "wrote out/report.json" in capsys.readouterr().out
    stored = CalibrationReport.from_json(tmp_path / "out" / "report.json")
    loaders = [DataLoader(TensorDataset(*samples(seed, n)), batch_size=20) for seed, n in ((1, 50), (2, 30))]
    expected = evaluate(
        posteriors, loaders[0], task="multiclass", ood_loaders={"noise": loaders[1]}, n_resamples=20, seed=3
    )
    assert numbers(stored) == numbers(expected)
    assert list(stored.metrics)[:6] == ["map", *posteriors]
    assert stored.ood.keys() == {"noise"}
    assert stored.posteriors.keys() == posteriors.keys()


OTHER_CURVATURES = {
    "the empirical Fisher": {"backend": CurvlinopsEF},
    "a Hessian": {"backend": CurvlinopsHessian},
    "drawn targets": {"backend_kwargs": {"stochastic": True, "num_samples": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_CURVATURES)
def test_states_of_other_curvatures_are_read(case, posteriors, tmp_path):
    la = posterior(posteriors["all"].model, **OTHER_CURVATURES[case])
    torch.save(la.state_dict(), "other.pt")
    assert main(["evaluate", *NAMES, "--state", "other.pt", *OPTIONS]) == 0
    stored = CalibrationReport.from_json(tmp_path / "out" / "report.json")
    loader = DataLoader(TensorDataset(*samples(1, 50)), batch_size=20)
    assert numbers(stored) == numbers(evaluate({"other": la}, loader, task="multiclass", n_resamples=20))


def test_a_failed_threshold_has_exit_code_1(posteriors, tmp_path):
    (tmp_path / "limits.toml").write_text('[[threshold]]\nmetric = "nll"\nmax = 0.001\n')
    arguments = ["evaluate", *NAMES, "--state", "all.pt", *OPTIONS, "--fail-on", "limits.toml"]
    assert main(arguments) == 1
    (tmp_path / "limits.toml").write_text('[[threshold]]\nmetric = "nll"\nmax = 100\n')
    assert main([*arguments, "--strict"]) == 0
    assert [c["status"] for c in json.loads((tmp_path / "out/report.json").read_text())["checks"]] == ["passed"] * 2


WRONG = {
    "no state": (["--state", "weights.pt"], "weights.pt is not the state of a posterior"),
    "no file": (["--state", "nowhere.pt"], "nowhere.pt is not a file"),
    "two of one name": (["--state", "all.pt", "./all.pt"], "expected different names"),
    "a subnetwork without its indices": (["--state", "part.pt"], "expected --subnetwork-indices"),
    "other weights": (["--state", "all.pt", "--weights", "other.pt"], "--state all.pt: The state was fitted at other"),
    "no loader": (["--state", "all.pt", "--loader", "evaluated_by_the_user:nothing"], "--loader .*; got NoneType"),
    "a nameless set": (["--state", "all.pt", "--ood-loader", "evaluated_by_the_user:noise"], "name=module:callable"),
    "another task": (["--state", "all.pt", "--task", "regression"], ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_exit_code_2(case, posteriors, tmp_path, capsys):
    other = {name: value + 1 for name, value in posteriors["all"].model.state_dict().items()}
    torch.save(other, "other.pt")
    options, message = WRONG[case]
    assert main(["evaluate", *NAMES, *options, *OPTIONS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("debiased-laplace: ")
    assert all(part in error for part in message.split(".*"))
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_state_of_class_weights_is_read(posteriors, tmp_path):
    model = posteriors["all"].model
    la = posterior(model, class_weights=[0.5, 1.25, 2.0])
    torch.save(la.state_dict(), "weighted.pt")
    assert main(["evaluate", *NAMES, "--state", "weighted.pt", *OPTIONS]) == 0
    expected = evaluate({"weighted": la}, DataLoader(TensorDataset(*samples(1, 50)), 20), task="multiclass")
    found = CalibrationReport.from_json(tmp_path / "out" / "report.json")
    name = next(name for name in found.metrics if name != "map")
    assert found.metrics[name]["nll"].value == pytest.approx(expected.metrics["weighted"]["nll"].value, rel=1e-6)
