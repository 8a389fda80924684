"""Distances and ratios of the demo's comparison."""

import pytest
import torch

from debiased_laplace.demo.comparison import distances, fit_posteriors, inflation, predict, total_variations
from debiased_laplace.demo.digits import N_CURVATURE, N_HELD_OUT, N_TRAIN, load, train
from debiased_laplace.demo.presentation import report_on

# trains a network
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted():
    data = load(seed=3)
    model = train(data, seed=3, device=torch.device("cpu"), epochs=10)
    return data, model, fit_posteriors(model, data, seed=3)


@pytest.fixture(scope="module")
def report(fitted):
    data, model, posteriors = fitted
    return report_on(model, posteriors, data, seed=3, device=torch.device("cpu"))


def test_the_network_has_the_stated_size(fitted):
    assert sum(p.numel() for p in fitted[1].parameters()) == 3254


def test_curvature_and_held_out_samples_are_disjoint(fitted):
    data = fitted[0]
    assert len(data.train) == N_TRAIN
    assert len(data.curvature) == N_CURVATURE
    assert len(data.held_out) == N_HELD_OUT
    assert not set(data.curvature.indices) & set(data.held_out.indices)


def test_posteriors_use_the_same_samples(fitted):
    same, split = fitted[2]["same_batch"].split, fitted[2]["debiased"].split
    assert torch.equal(same.used_indices, split.used_indices.sort().values)
    assert same.n_data == split.n_data == fitted[2]["full batch"].split.n_samples == N_TRAIN


def test_the_held_out_kl_estimates_the_true_one(fitted, report):
    found = distances(fitted[2], report.posteriors)
    assert abs(found["full batch"].true) < 1e-2
    assert found["full batch"].estimated is None
    for name in ("same_batch", "debiased"):
        assert found[name].estimated.reference == "full batch"
        error = found[name].estimated.difference - found[name].true
        assert abs(error) < 4 * found[name].estimated.standard_error
        # the distance is many standard errors
        assert found[name].true > 4 * found[name].estimated.standard_error


def test_inflation_is_one_for_the_full_batch_itself(fitted):
    full = fitted[2]["full batch"]
    torch.testing.assert_close(inflation(full, full)[:50], torch.ones(50).double(), rtol=1e-4, atol=0)
    assert inflation(fitted[2]["same_batch"], full)[0] > 1


def test_total_variation_of_the_full_batch_from_itself_is_zero(fitted):
    data, model, posteriors = fitted
    variations = total_variations(predict(model, posteriors, data.test_inputs))
    assert variations["full batch"] == 0
    assert 0 < variations["debiased"] < 1


def test_total_variation_of_certain_but_different_classes_is_one():
    predictions = {
        "full batch": torch.eye(3),
        "another": torch.eye(3).roll(1, 0),
        "half": 0.5 * (torch.eye(3) + torch.eye(3).roll(1, 0)),
    }
    assert total_variations(predictions) == {"full batch": 0, "another": 1, "half": 0.5}


def test_the_report_has_the_network_the_posteriors_and_out_of_distribution_images(fitted, report):
    data, model, posteriors = fitted
    assert [name for name in report.methods if name in ("MAP", *posteriors)] == ["MAP", *posteriors]
    assert report.baseline == "MAP"
    predictions = predict(model, posteriors, data.test_inputs)
    for name, p in predictions.items():
        expected = -p.double().gather(1, data.test_targets[:, None]).log().mean().item()
        assert report.metrics[name]["nll"].value == pytest.approx(expected, rel=1e-4)
    assert list(report.ood) == ["scrambled digits"]
    assert torch.equal(data.scrambled.flatten(1).sort(1).values, data.test_inputs.flatten(1).sort(1).values)
    assert not torch.equal(data.scrambled, data.test_inputs)
