"""Shares of the curvature in leading rows, against dense computations of all scores."""

from dataclasses import replace

import pytest
import torch
from models import cnn, layer_norm_net, mlp, targets
from oracles import dense_ggn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace.diagnosis import Diagnosis, RowShares, diagnose

BIN = 6e-3  # relative width of a bin of scores


def found(model: nn.Module, *tensors: Tensor, likelihood: str = "classification", **options) -> Diagnosis:
    options = {"batch_sizes": [4], "n_draws": 1, "prior_precision": None, "batch_size": 7, **options}
    loader = DataLoader(TensorDataset(*tensors), batch_size=options.pop("batch_size"))
    return diagnose(model, likelihood, loader, **options)


def dense_scores(model: nn.Sequential, X: Tensor, y: Tensor, kind: str) -> Tensor:
    """Scores of all rows from the formulas, for a last layer that is linear."""
    outputs, features = model(X).detach(), model[:-1](X).detach()
    p = outputs.softmax(1)
    if kind == "ggn":
        sizes = torch.linalg.eigvalsh(p.diag_embed() - p[:, :, None] * p[:, None, :])
    else:
        sizes = (p - nn.functional.one_hot(y, p.shape[1])).square().sum(1, keepdim=True)
    return sizes * (1 + features.square().sum(1, keepdim=True))


def assert_shares_are_those_of(rows: RowShares, scores: Tensor) -> None:
    shares = scores.flatten().clamp_min(0).sort(descending=True).values.cumsum(0)
    shares = shares / shares[-1].clone()
    assert rows.n_rows == len(shares)
    torch.testing.assert_close(rows.leading, shares[rows.numbers - 1], rtol=BIN, atol=0)
    for n, share in ((rows.n_for_90, 0.90), (rows.n_for_99, 0.99)):
        smallest = int((shares < share).sum()) + 1
        assert abs(n - smallest) <= 1
    assert bool((rows.leading.diff() >= 0).all())
    assert float(rows.leading[-1]) == 1


NETWORKS = {"fully connected": mlp, "convolutions": cnn}


@pytest.mark.parametrize("kind", ["ggn", "ef"])
@pytest.mark.parametrize("name", NETWORKS)
def test_shares_are_those_of_dense_scores(name, kind):
    model, X = NETWORKS[name]()
    y = targets("classification")
    with torch.no_grad():
        model[-1].weight *= 8  # scores of many sizes
    rows = found(model, X, y, curvature=kind).rows
    scores = dense_scores(model, X, y, kind)
    assert_shares_are_those_of(rows, scores)
    assert float(rows.leading[2]) > 1.5 * float(rows.random[2])
    n = scores.numel()
    assert rows.numbers.tolist() == [2**i for i in range(7) if 2**i < n] + [n]
    torch.testing.assert_close(rows.random, rows.numbers.double() / n)


def test_of_a_linear_model_scores_are_the_trace():
    """The rows are those of the last layer, so that shares are exact within the bins."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, X = nn.Sequential(nn.Linear(4, 3)).double(), 3 * torch.randn(40, 4, dtype=torch.float64)
    y = targets("classification")
    trace = torch.stack([H.trace() for H in dense_ggn(model, X, "classification")[0]])
    scores = dense_scores(nn.Sequential(nn.Identity(), *model), X, y, "ggn")
    torch.testing.assert_close(scores.sum(1), trace)
    assert_shares_are_those_of(found(model, X, y).rows, scores)


def test_batches_make_no_difference():
    model, X = mlp()
    y = targets("classification")
    by_seven, at_once = (found(model, X, y, batch_size=size).rows for size in (7, 40))
    torch.testing.assert_close(by_seven.leading, at_once.leading)
    assert (by_seven.n_for_90, by_seven.n_for_99) == (at_once.n_for_90, at_once.n_for_99)


def test_rows_of_a_regression_share_the_curvature_alike():
    model, X = mlp(n_outputs=2)
    rows = found(model, X, targets("regression", n_outputs=2), likelihood="regression").rows
    torch.testing.assert_close(rows.leading, rows.random)
    assert (rows.n_rows, rows.n_for_90, rows.n_for_99) == (80, 72, 80)


def test_by_gradients_rows_of_a_regression_differ():
    model, X = mlp(n_outputs=2)
    y = targets("regression", n_outputs=2)
    rows = found(model, X, y, likelihood="regression", curvature="ef").rows
    assert_shares_are_those_of(rows, (model(X).detach() - y).square().sum(1))


def test_weights_of_samples_count():
    model, X = mlp()
    y = targets("classification")
    weights = torch.linspace(0.1, 30, len(X), dtype=torch.float64)
    scores = weights[:, None] * dense_scores(model, X, y, "ggn")
    assert_shares_are_those_of(found(model, X, y, weights).rows, scores)


def test_more_classes_than_eigenvectors_have_one_row_for_each_class():
    model, X = mlp(n_outputs=140)
    rows = found(model, X, torch.arange(40)).rows
    assert rows.n_rows == 40 * 140
    assert float(rows.leading[-1]) == 1


def test_networks_without_a_last_linear_layer_have_shares_by_outputs_alone():
    model, X = layer_norm_net()
    p = model(X).detach().softmax(1)
    scores = torch.linalg.eigvalsh(p.diag_embed() - p[:, :, None] * p[:, None, :])
    assert_shares_are_those_of(found(model, X, targets("classification")).rows, scores)


def test_no_curvature_has_no_shares():
    model, X = mlp()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([2000.0, 0.0, -2000.0]))
    y = torch.zeros(40, dtype=torch.int64)
    diagnosis = found(model, X, y, curvature="ef")
    assert diagnosis.rows is None
    assert "99 %" not in str(diagnosis)


@pytest.mark.untyped
def test_a_hessian_has_no_rows_and_is_refused():
    model, X = mlp()
    with pytest.raises(ValueError, match="curvature must be one of"):
        found(model, X, targets("classification"), curvature="hessian")


def test_text_and_figure_show_where_the_curvature_is():
    model, X = mlp()
    diagnosis = found(model, X, targets("classification"))
    few = RowShares(14000, torch.tensor([1, 14000]), torch.tensor([0.1, 1.0]).double(), 200, 512)
    shown = replace(diagnosis, rows=few)
    sentence = (
        "By their scores, 99 % of the curvature is in 512 of 14\u202f000 rows; "
        "as many rows of random samples carry 3.7 %."
    )
    assert str(few) == sentence
    assert f'{sentence} A posterior with sampling="curvature"' in str(shown)
    assert "carry 99 %" in str(replace(few, n_for_99=13900))
    assert "sampling=" not in str(replace(diagnosis, rows=replace(few, n_for_99=7001)))
    assert "512 rows: 99 %" in shown.figure().svg
    assert "rows" not in replace(diagnosis, rows=None).figure().svg
