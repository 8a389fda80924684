"""The fidelity benchmark: its criteria against closed forms and dense oracles, its command on a tiny grid."""

import json
import re
from dataclasses import replace
from pathlib import Path

import models
import oracles
import pytest
import torch
from scipy import integrate, stats
from torch.utils.data import TensorDataset

from benchmarks import fidelity as command
from benchmarks import fidelity_criteria as criteria
from benchmarks import fidelity_posteriors as posteriors
from benchmarks import fidelity_results as results
from benchmarks import fidelity_shared as shared
from benchmarks import fidelity_table, interval_coverage
from benchmarks import fidelity_tasks as tasks
from benchmarks import fidelity_verdicts as verdicts

PRIOR, SIGMA = 3.0, 0.7
DISTANCES = ("parameter_kl", "predictive_kl", "log_variance_error", "total_variation", "log_det_difference")


def small_task(likelihood="classification"):
    """A network in double precision, so that routes through the package's operators compare tightly."""
    model, X = models.mlp(n_outputs=3 if likelihood == "classification" else 1)
    y = torch.arange(len(X)) % 3 if likelihood == "classification" else X[:, :1].clone()
    noise = 1.0 if likelihood == "classification" else SIGMA
    curvature = tasks.mean_ggn(model, X[:30], likelihood)
    jacobians, outputs = tasks.jacobians_and_outputs(model, X[30:])
    train = TensorDataset(X[:30], y[:30])
    return tasks.Task("small", "small", likelihood, model, train, noise, "", curvature, jacobians, outputs)


def reference_of(task, prior=PRIOR):
    noise = None if task.likelihood == "classification" else task.sigma_noise
    weight = task.n_data / task.sigma_noise**2
    return criteria.reference(task.curvature, task.jacobians, task.outputs, weight=weight, prior=prior, noise=noise)


def dense_approximation(task, P, R):
    """What the criteria need to know of a dense precision, by its inverse."""
    covariance = torch.linalg.inv(P)
    J = task.jacobians
    return criteria.Approximation(J @ covariance @ J.mT, float((covariance @ R).trace()), float(torch.logdet(P)))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_reference_curvature_is_the_dense_ggn(likelihood):
    task = small_task(likelihood)
    _, expected = oracles.dense_ggn(task.model, task.train.tensors[0], likelihood)
    torch.testing.assert_close(task.curvature, expected, rtol=1e-12, atol=1e-14)
    expected = oracles.dense_jacobian(task.model, task.train.tensors[0][3])
    J, _ = tasks.jacobians_and_outputs(task.model, task.train.tensors[0][3:4])
    torch.testing.assert_close(J[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_reference_is_at_no_distance_from_itself(likelihood):
    task = small_task(likelihood)
    full = reference_of(task)
    found = criteria.distances(dense_approximation(task, full.precision, full.precision), full)
    assert {name: found[name] for name in DISTANCES} == pytest.approx(dict.fromkeys(DISTANCES, 0.0), abs=1e-10)
    assert found["variance_ratio"] == pytest.approx(1.0)


def test_a_precision_known_in_closed_form():
    """A fourth of the variance everywhere: every criterion has a formula."""
    task = small_task()
    full = reference_of(task)
    n_parameters, n_outputs = len(task.curvature), 3
    found = criteria.distances(dense_approximation(task, 4 * full.precision, full.precision), full)
    each = 0.5 * (1 / 4 - 1 + torch.log(torch.tensor(4.0)).item())
    assert found["parameter_kl"] == pytest.approx(each * n_parameters)
    assert found["log_det_difference"] == pytest.approx(n_parameters * torch.log(torch.tensor(4.0)).item())
    assert found["variance_ratio"] == pytest.approx(1 / 4)
    assert found["log_variance_error"] == pytest.approx(torch.log(torch.tensor(4.0)).item())
    # here the reference comes first: N(0, 4) against N(0, 1)
    assert found["predictive_kl"] == pytest.approx(n_outputs * 0.5 * (4 - 1 - torch.log(torch.tensor(4.0)).item()))
    assert found["total_variation"] > 0.01


def test_parameter_kl_is_that_of_two_gaussians():
    task = small_task()
    full = reference_of(task)
    P = full.precision + 2 * torch.diag(torch.linspace(0.1, 3, len(full.precision), dtype=torch.float64))
    found = criteria.distances(dense_approximation(task, P, full.precision), full)["parameter_kl"]
    normals = [
        torch.distributions.MultivariateNormal(torch.zeros(len(m), dtype=torch.float64), precision_matrix=m)
        for m in (P, full.precision)
    ]
    assert found == pytest.approx(float(torch.distributions.kl_divergence(*normals)), rel=1e-9)


def test_predictive_kl_is_infinite_for_a_singular_covariance_and_not_recorded():
    task = small_task()
    full = reference_of(task)
    v = torch.ones(10, 3, 1, dtype=torch.float64)
    found = criteria.distances(criteria.Approximation(v @ v.mT), full)
    assert found["predictive_kl"] is None
    assert found["parameter_kl"] is None
    assert found["total_variation"] > 0


@pytest.mark.parametrize("pair", [(0.4, 1.9), (2.5, 0.3), (1.2, 1.3)])
def test_total_variation_of_gaussians(pair):
    found = criteria.gaussian_total_variation(*(torch.tensor([s], dtype=torch.float64) for s in pair))
    densities = [stats.norm(scale=s).pdf for s in pair]
    expected = 0.5 * integrate.quad(lambda x: abs(densities[0](x) - densities[1](x)), -30, 30, limit=500)[0]
    assert float(found) == pytest.approx(expected, abs=1e-7)


def test_predictive_probabilities_against_quadrature():
    """Two classes: the probability is a one-dimensional integral over the difference of the outputs."""
    outputs = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    covariance = torch.tensor([[[6.0, -1.0], [-1.0, 4.0]]], dtype=torch.float64)
    full = criteria.Reference(torch.eye(2), 0.0, covariance, outputs, None)
    variance = 6 + 4 + 2
    logistic = lambda z: 1 / (1 + torch.exp(torch.tensor(-(1.5 + z * variance**0.5)))).item()  # noqa: E731
    expected = integrate.quad(lambda z: logistic(z) * stats.norm.pdf(z), -9, 9)[0]
    at_the_mean = logistic(0.0)
    found = float(criteria.probabilities(covariance, full)[0, 0])
    assert abs(expected - at_the_mean) > 0.1
    assert found == pytest.approx(expected, abs=0.02)


def test_coverage_counts_hits_and_leaves_out_what_is_nothing():
    values = torch.tensor([10.0, 1.0, 1.0, 1e-6])
    errors = torch.tensor([1.0, 0.5, 0.5, 1.0])
    # missed by both; within both; below 1 - 1.96 / 2 > 0.02 on the plain scale only
    truth = torch.tensor([13.0, 1.5, 0.1, 0.0])
    intervals = torch.tensor([[9.0, 13.0], [0.0, 1.4], [0.2, 3.0], [0.0, 1.0]])
    found = criteria.coverage(values, errors, truth, intervals)
    assert found == {"n": 3, "interval": 1, "plain": 2, "log": 1}


def test_a_fit_that_keeps_its_rank_has_its_intervals_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.RECIPES, "diabetes", replace(tasks.RECIPES["diabetes"], epochs=5))
    benchmark = command.Benchmark(tasks.load_task("diabetes", tmp_path), [PRIOR], 0)
    for name, n in (("lowrank/cross_fitted/none/free", 32), ("lowrank/held_out/none/free", 16)):
        ((record,),) = benchmark.measure(32, 0, {name: posteriors.configurations()[name]})
        assert record["n_magnitude_samples"] == n
        found = record["coverage"]
        assert set(found) == {"n", "interval", "plain", "log"}
        assert 0.5 * found["n"] < found["plain"] <= found["interval"] <= found["n"] <= record["rank"]


def test_coverage_of_results_from_before_there_were_intervals():
    key = {"version": 0, "task": "digits", "weights": "x", "B": 64, "n_data": 9, "draw": 0, "configuration": "c"}
    known = {**key, "n_magnitude_samples": 32}
    records = [
        {**known, "prior": 1.0, "coverage": {"n": 10, "plain": 8, "log": 9}},
        {**known, "prior": 1.0, "draw": 1, "coverage": {"n": 30, "interval": 27, "plain": 24, "log": 24}},
    ]
    (found,) = results.coverage_of(records)
    assert (found["intervals"], found["interval"], found["plain"]) == (40, 0.9, 0.8)
    (found,) = results.coverage_of(records[:1])
    assert found["interval"] is None


METRIC = {"complement": "kron", "metric": "kron"}
ROUTES = {
    "low rank, isotropic diagonal": ("lowrank/held_out/none/free", {"complement": "none"}),
    "isotropic complement": ("lowrank/held_out/isotropic/5", {"rank": 5, "complement": "isotropic"}),
    "diagonal, few directions": ("lowrank/held_out/diagonal/5", {"rank": 5, "complement": "diagonal"}),
    "diagonal, many directions": ("lowrank/same_batch/diagonal/60", {"rank": 60, "complement": "diagonal"}),
    "Kronecker diagonal, few directions": ("lowrank/cross_fitted/kron/5", {"rank": 5, "complement": "kron"}),
    "Kronecker diagonal, many directions": ("lowrank/same_batch/kron/60", {"rank": 60, "complement": "kron"}),
    "Kronecker metric, few directions": ("lowrank/cross_fitted/kron_metric/5", {**METRIC, "rank": 5}),
    "Kronecker metric, many directions": ("lowrank/same_batch/kron_metric/60", {**METRIC, "rank": 60}),
    "corrected": (
        "lowrank/held_out/none/free",
        {"complement": "none", "inverse_correction": "second_order"},
    ),
    "Kronecker": ("kron/held_out", {"hessian_structure": "kron"}),
    "full": ("full/held_out", {"hessian_structure": "full"}),
}


@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.filterwarnings("ignore:rank=60 was asked for")
def test_approximations_by_every_route_are_those_of_the_dense_precision(case, likelihood):
    task = small_task(likelihood)
    name, options = ROUTES[case]
    options = {"magnitudes": name.split("/")[1], **options}
    la = posteriors.fit(task, name, options, list(range(4, 26)), seed=2)
    examination = posteriors.Examination(task, la)
    for prior in (PRIOR, 40.0):
        posteriors.set_prior(la, prior)
        R = reference_of(task, prior).precision
        found = examination.approximation(prior)
        expected = dense_approximation(task, la.posterior_precision.to_dense(), R)
        assert found.trace == pytest.approx(expected.trace, rel=1e-9)
        assert found.log_det == pytest.approx(expected.log_det, rel=1e-9)
        torch.testing.assert_close(found.covariances, expected.covariances, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["diag", "kron", "last_layer_kron", "ella"])
def test_approximations_of_laplace_torch_are_what_it_says_itself(kind):
    task = small_task()
    la = posteriors.fit(task, f"laplace-torch/{kind}", {"kind": kind}, list(range(20)), seed=1)
    posteriors.set_prior(la, PRIOR)
    found = posteriors.Examination(task, la).approximation(PRIOR)
    _, variance = la._glm_predictive_distribution(models.mlp()[1][30:])
    torch.testing.assert_close(found.covariances, variance.double(), rtol=1e-4, atol=1e-7)
    if kind == "diag":
        _, H = oracles.dense_ggn(task.model, task.train.tensors[0][:20], "classification")
        # 20 samples stand for 30
        P = torch.diag(30 * H.diagonal() + PRIOR)
        expected = dense_approximation(task, P, reference_of(task).precision)
        assert found.trace == pytest.approx(expected.trace, rel=1e-5)
        assert found.log_det == pytest.approx(expected.log_det, rel=1e-5)
    assert (found.trace is None) == (kind in ("last_layer_kron", "ella"))


SHARED = [
    "lowrank/same_batch/none/free",
    "lowrank/held_out/kron/25",
    "lowrank/held_out/kron_metric/free",
    "lowrank/cross_fitted/none/25",
    "lowrank/cross_fitted/diagonal/free",
    "lowrank/cross_fitted/kron/free",
    "lowrank/cross_fitted/kron_metric/25",
    posteriors.CORRECTED,
]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.filterwarnings("ignore:rank=25 was asked for", "ignore:rank=None left out directions")
def test_what_posteriors_share_changes_none_of_them(likelihood):
    task, samples = small_task(likelihood), list(range(3, 23))
    table = {name: posteriors.configurations()[name] for name in SHARED}
    fit_together = shared.SharedFit(task, posteriors.loader_of(task, samples), seed=4)
    found = {name: la for name, la, _ in fit_together.posteriors(table)}
    assert set(found) == set(SHARED)
    for name, la in found.items():
        alone = posteriors.fit(task, name, table[name], samples, seed=4)
        for one in (la, alone):
            posteriors.set_prior(one, PRIOR)
        assert torch.equal(la.split.direction_indices, alone.split.direction_indices)
        P, expected = la.posterior_precision.to_dense(), alone.posterior_precision.to_dense()
        torch.testing.assert_close(P, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
        torch.testing.assert_close(la.standard_errors, alone.standard_errors, rtol=1e-6, atol=1e-12)


def test_linear_shrinkage_is_the_weighted_mean_of_two_curvatures():
    task, samples = small_task(), list(range(20))
    fit_together = shared.SharedFit(task, posteriors.loader_of(task, samples), seed=4)
    _, H = oracles.dense_ggn(task.model, task.train.tensors[0][:20], "classification")
    kron = posteriors.fit(task, "", {"hessian_structure": "kron", "magnitudes": "cross_fitted"}, samples, seed=4)
    ((name, la, _),) = fit_together.shrunk({"shrinkage/0.3": 0.3})
    for one in (la, kron):
        posteriors.set_prior(one, PRIOR)
    assert name == "shrinkage/0.3"
    prior = PRIOR * torch.eye(len(H), dtype=torch.float64)
    target = (kron.posterior_precision.to_dense() - prior) / task.n_data
    expected = task.n_data * (0.3 * H + 0.7 * target) + prior
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:rank=25 was asked for", "ignore:rank=None left out directions")
def test_the_automatic_choice_at_several_priors_is_that_of_a_fit_at_each():
    task, samples = small_task(), list(range(20))
    kind = posteriors.configurations()[posteriors.AUTO]
    priors = [0.3, 40.0]
    choices, _ = shared.SharedFit(task, posteriors.loader_of(task, samples), seed=2).choices(kind, priors)
    for prior in priors:
        la = posteriors.DebiasedLaplace(
            task.model, "classification", seed=2, prior_precision=prior, sampling="uniform", **kind
        )
        la.fit(posteriors.loader_of(task, samples), n_data=task.n_data)
        assert la.choice.chosen == choices[prior].chosen
        assert posteriors.name_of(la.choice.chosen) in posteriors.configurations()
        for ours, theirs in zip(la.choice.runners_up, choices[prior].runners_up, strict=True):
            assert ours.excess == pytest.approx(theirs.excess, rel=1e-6, abs=1e-6)


def test_no_magnitudes_are_closer_than_the_true_curvatures():
    task = small_task()
    la = posteriors.fit(task, "", {"magnitudes": "held_out", "complement": "none", "rank": 4}, list(range(20)), seed=0)
    posteriors.set_prior(la, PRIOR)
    full = reference_of(task)
    examination = posteriors.Examination(task, la)
    least = examination.with_true_curvatures(PRIOR)
    U = la.directions
    truth = task.n_data * (U.T @ task.curvature @ U).diagonal()
    P = PRIOR * torch.eye(len(U), dtype=torch.float64) + (U * truth) @ U.T
    expected = dense_approximation(task, P, full.precision)
    assert least.trace == pytest.approx(expected.trace, rel=1e-9)
    assert least.log_det == pytest.approx(expected.log_det, rel=1e-9)

    def kl(factor):
        moved = dense_approximation(task, P + (factor - 1) * (U * truth) @ U.T, full.precision)
        return criteria.distances(moved, full)["parameter_kl"]

    lowest = criteria.distances(least, full)["parameter_kl"]
    assert lowest < min(kl(0.9), kl(1.1), criteria.distances(examination.approximation(PRIOR), full)["parameter_kl"])


def test_true_curvatures_are_those_of_the_full_batch():
    task = small_task()
    la = posteriors.fit(task, "", {"magnitudes": "held_out", "complement": "none", "rank": 4}, list(range(20)), seed=0)
    U = la.directions
    found = posteriors.Examination(task, la).true_curvatures()
    torch.testing.assert_close(found, (U.T @ task.curvature @ U).diagonal(), rtol=1e-10, atol=1e-14)


def record(configuration, parameter_kl, *, draw=0, B=64, **others):
    key = {"version": results.VERSION, "task": "digits", "weights": "w", "B": B, "n_data": 1400, "draw": draw}
    values = {"parameter_kl": parameter_kl, "total_variation": parameter_kl / 100, "predictive_kl": 1.0}
    return {**key, "configuration": configuration, "prior": 10.0, **values, **others}


def test_verdicts_name_the_cells_that_miss_the_goal():
    records = []
    for B, cross in ((64, 2.0), (128, 6.0), (32, 9.0)):
        for draw in range(3):
            records += [
                record(verdicts.SAME, 4.0 + draw, draw=draw, B=B),
                record(verdicts.CROSS, cross, draw=draw, B=B),
            ]
    lines = verdicts.verdicts(results.summarize(records))
    assert "parameter KL, B from 64 to N/2: in 1 of 2 cells; digits, B = 128, prior 10: 1.20 times" in lines[0]
    assert any("median over cells with B of 64 to 128 (goal: 2): 1.67 over 2 cells" in line for line in lines)
    assert any("auto" in line and verdicts.NOT_MEASURED in line for line in lines)


def test_summaries_have_standard_errors_rank_correlations_and_failures(tmp_path):
    records = [record(f"c{i}", float(i), held_out_kl=v) for i, v in enumerate((5.0, 7.0, 6.0, 9.0))]
    records += [record("c1", 4.0, draw=1), {**record("bad", 0.0), "error": "ValueError: no"}]
    summary = results.summarize(records)
    cell = results.Cell("digits", 64, 10.0)
    mean = summary.cells[cell]["c1"]["parameter_kl"]
    assert (mean.mean, mean.standard_error, mean.n) == (2.5, pytest.approx(1.5), 2)
    # one of six pairs is discordant
    assert summary.kendall[cell].mean == pytest.approx(4 / 6)
    assert summary.errors == {"digits, B = 64, bad: ValueError: no": 1}
    summary.save(tmp_path, verdicts=["one"])
    kept = results.Summary.read(tmp_path)
    assert kept.cells[cell]["c1"]["parameter_kl"] == mean
    assert (kept.n_data, kept.coverage, kept.errors) == (summary.n_data, summary.coverage, summary.errors)
    assert kept.kendall[cell].mean == pytest.approx(4 / 6, rel=1e-4)
    assert json.loads((tmp_path / "fidelity.json").read_text())["verdicts"] == ["one"]


def test_an_interrupted_line_is_measured_again_and_the_last_result_counts(tmp_path):
    store = results.Store(tmp_path / "results.jsonl")
    store.append([record("a", 1.0), record("b", 2.0)])
    with store.path.open("a") as file:
        file.write('{"version": 1, "task": "dig')
    again = results.Store(store.path)
    assert len(again.records) == 2
    again.append([record("a", 3.0)])
    kept = results.Store(store.path).records
    assert sorted(r["parameter_kl"] for r in kept.values()) == [2.0, 3.0]


def test_the_command_on_a_tiny_grid(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tasks.RECIPES, "diabetes", replace(tasks.RECIPES["diabetes"], epochs=5))
    grid = ["--tasks", "diabetes", "--sizes", "32", "--silent", "--threads", str(torch.get_num_threads())]
    files = ["--cache", str(tmp_path / "cache"), "--results", str(tmp_path)]
    kinds = ["--configurations", "lowrank/[hc]*/none/25", "laplace-torch/kron"]
    command.main([*grid, *files, *kinds, "--draws", "1"])
    stored = tmp_path / "cache" / "results.jsonl"
    first = stored.read_text()
    assert len(first.splitlines()) == 3 * 3
    assert (tmp_path / "fidelity.png").read_bytes()[:4] == b"\x89PNG"
    document = json.loads((tmp_path / "fidelity.json").read_text())
    assert len(document["kendall_tau"]) == 3
    assert document["verdicts"]
    assert len(results.Summary.read(tmp_path).cells) == 3
    assert ",lowrank/held_out/none/25," in (tmp_path / "fidelity.csv").read_text()
    assert "failed" not in capsys.readouterr().out

    # going on: what is there is not measured again; what fails is kept with its message
    def fit(*_, **__):
        raise RuntimeError("no factor")

    monkeypatch.setattr(command, "fit", fit)
    monkeypatch.setattr(command.fidelity_figure, "draw", lambda *_, **__: None)
    command.main([*grid, *files, *kinds, "--draws", "2"])
    added = stored.read_text().removeprefix(first).splitlines()
    assert [json.loads(line)["draw"] for line in added] == [1] * 9
    assert sum("no factor" in line for line in added) == 3
    said = capsys.readouterr().out
    assert "failed, 3 times: diabetes, B = 32, laplace-torch/kron: RuntimeError: no factor" in said


def test_the_table_of_intervals(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tasks.RECIPES, "diabetes", replace(tasks.RECIPES["diabetes"], epochs=5))
    monkeypatch.setattr(interval_coverage, "SIZES", {"held_out": (40,), "cross_fitted": (30, 300)})
    arguments = ["--tasks", "diabetes", "--draws", "2", "--cache", str(tmp_path)]
    interval_coverage.main(arguments)
    said = capsys.readouterr().out
    assert said.count("| `held_out` | 20 | ") == said.count("| `cross_fitted` | 30 | ") == 2
    assert "| 300 |" not in said  # nearly all of the 350
    # what is known is not measured again
    monkeypatch.setattr(interval_coverage, "fit", None)
    interval_coverage.main(arguments)
    assert capsys.readouterr().out == said


def test_the_table_of_the_readme_is_the_one_the_benchmark_wrote():
    """And its numbers are those of the results; these have five digits, so that a last digit may be rounded twice."""
    top = Path(__file__).parent.parent
    rows = [row for row in (top / "benchmarks/results/fidelity.md").read_text().splitlines() if row.startswith("|")]
    shown = [row for row in (top / "README.md").read_text().splitlines() if row in rows]
    assert shown == rows
    again = fidelity_table.in_short(results.Summary.read(top / "benchmarks/results"))
    for row, other in zip(rows, again.splitlines()[2:], strict=True):
        numbers, expected = ([float(n) for n in re.findall(r"\d[\d.]*", r.replace(",", ""))] for r in (row, other))
        assert numbers == pytest.approx(expected, rel=2e-3)
