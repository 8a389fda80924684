"""The benchmark of whole training runs: what a step is charged, what a run keeps, tuning, report and command."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import newton_runs as runs
from benchmarks import newton_runs_table as table
from benchmarks import newton_tasks as tasks
from benchmarks import newton_work as work_of
from debiased_laplace.curvature.derivatives import LinearizedBatch
from debiased_laplace.newton import acceptance

TINY = ["--tasks", "30_classes", "--passes", "0.5", "--batch", "100", "--seeds", "2", "--cache"]


def tiny_task(n=120):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 3, generator=generator)
    y = (X[:, 0] + 1.5 * torch.randn(n, generator=generator) > 0).long()

    def network():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Linear(3, 2)

    return tasks.NewtonTask((X[:90], y[:90]), (X[90:], y[90:]), network, lambda epochs: network())


@pytest.mark.parametrize("shrinkage", [False, True])
@pytest.mark.parametrize("magnitudes", ["same_batch", "held_out", "cross_fitted"])
def test_a_step_is_charged_with_what_the_package_does(magnitudes, shrinkage, monkeypatch):
    """Counted where outputs, derivatives and gradients are computed, in samples."""
    work = []
    make, push, pull, losses_at = (
        LinearizedBatch.__init__,
        LinearizedBatch.pushed,
        LinearizedBatch.pulled,
        acceptance._losses_at,
    )

    def made(self, *arguments):
        make(self, *arguments)
        work.append(len(self.outputs) * work_of.FORWARD)

    def pushed(self, X):
        work.append(len(self.outputs) * X.shape[1] * work_of.DERIVATIVE)
        return push(self, X)

    def pulled(self, W):
        work.append(len(W) * work_of.BACKWARD)
        return pull(self, W)

    def counted_losses_at(problem, batch, d):
        work.append(len(batch) * work_of.FORWARD)
        return losses_at(problem, batch, d)

    task = tiny_task()
    model = task.network()
    run = runs.Run(magnitudes, shrinkage, None, 0, 80, 1.0)
    optimizer = runs.optimizer_of(run, model, 90)
    batch = task.train[0][:80], task.train[1][:80]
    runs.step_on(optimizer, model, batch)  # the first one meets the network
    monkeypatch.setattr(LinearizedBatch, "__init__", made)
    monkeypatch.setattr(LinearizedBatch, "pushed", pushed)
    monkeypatch.setattr(LinearizedBatch, "pulled", pulled)
    monkeypatch.setattr(acceptance, "_losses_at", counted_losses_at)
    charged = runs.step_on(optimizer, model, batch)
    assert optimizer.last_step.outcome.products > 1
    assert optimizer.last_step.acceptance is not None
    assert charged == pytest.approx(sum(work), rel=1e-6)


def test_first_order_steps_are_charged_their_samples_and_take_the_chosen_rate():
    task = tiny_task()
    model = task.network()
    X, y = task.train
    before = [p.clone() for p in model.parameters()]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(X), y), list(model.parameters()))
    optimizer = runs.optimizer_of(runs.Run("SGD", None, 0.7, 0, 30, 1.0), model, 90)
    assert runs.step_on(optimizer, model, (X, y)) == len(X)
    for p, old, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.7 * g)
    adam = runs.optimizer_of(runs.Run("Adam", None, 0.02, 0, 30, 1.0), model, 90)
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["lr"] == 0.02


def test_batches_are_whole_and_disjoint_until_the_samples_are_used_up():
    drawn = runs.batches(100, runs.Run("SGD", None, 0.1, 3, 30, 1.0))
    first, second = (torch.cat([next(drawn) for _ in range(3)]) for _ in range(2))
    for pass_ in (first, second):
        assert len(pass_) == len(pass_.unique()) == 90
    assert not torch.equal(first, second)


def test_a_newton_run_keeps_every_step_and_counts_those_that_raised_the_loss(monkeypatch):
    task = tiny_task()
    run = runs.Run("same_batch", True, None, 0, 12, 15.0)
    kept = runs.followed(run, task)
    assert kept["passes"][0] == kept["seconds"][0] == 0
    assert (np.diff(kept["passes"]) > 0).all()
    assert kept["passes"][-2] < 15 <= kept["passes"][-1]
    assert len(kept["training"]) == kept["steps"] + 1
    changes = np.diff(kept["training"])
    assert kept["accepted"] == (changes != 0).sum() > 0
    # with a standard error of 0, every accepted step whose loss rose counts as raised; with an infinite one, none
    assert (changes > 0).any()
    newton_step = runs.step_on
    for error, raised in ((0.0, (changes > 0).sum()), (np.inf, 0)):

        def with_error(optimizer, model, batch, error=error):
            work = newton_step(optimizer, model, batch)
            if optimizer.last_step.accepted:
                object.__setattr__(optimizer.last_step.acceptance, "standard_error", error)
            return work

        monkeypatch.setattr(runs, "step_on", with_error)
        assert runs.followed(run, task)["raised"] == raised


def test_a_run_that_diverges_ends_with_an_infinite_loss():
    kept = runs.followed(runs.Run("SGD", None, 1e38, 0, 10, 50.0), tiny_task())
    assert kept["training"][-1] == kept["test"][-1] == np.inf
    assert kept["passes"][-1] < 50


def test_labels_of_30_classes_are_those_of_its_own_random_network():
    """A fifth of the task's labels is drawn anew; another network would agree with about a thirtieth of them."""
    X, y = tasks.newton_task("30_classes", 3).train
    agreement = float((tasks.labels_of_many_classes(X, 3) == y).double().mean())
    assert agreement == pytest.approx(0.8 + 0.2 / 30, abs=0.03)


def made_up(training, test, passes=(0.0, 1.0, 3.0, 10.0), seconds=(0.0, 1.0, 2.0, 4.0)):
    counts = {"steps": 3, "accepted": 2, "raised": 1}
    losses = {"training": training, "test": test, "accuracy": [0.1, 0.2, 0.3, 0.5]}
    return {"passes": list(passes), "seconds": list(seconds), **losses, **counts}


def test_a_curve_is_what_was_reached_by_then():
    found = table.along([made_up([4.0, 3.0, 2.0, 1.0], [0.0] * 4)], "training", np.array([0.5, 1, 2.9, 3, 9.9, 10, 12]))
    assert found.tolist() == [[4, 3, 3, 2, 2, 1, 1]]


def test_report_of_known_runs(tmp_path):
    """Two seeds whose losses differ by 2: a mean with a standard error of 1; paired differences of 1 ± 0 and 0 ± 1."""
    found = {
        "same_batch": [made_up([9.0, 6.0, 4.0, 2.0], [5.0, 2.0, 3.0, 3.0]), made_up([9.0, 6.0, 4.0, 4.0], [5.0] * 4)],
        "cross_fitted, shrinkage": [made_up([9.0, 5.0, 3.0, 1.0], [5.0] * 4), made_up([9.0, 5.0, 3.0, 3.0], [5.0] * 4)],
        "SGD": [made_up([9.0, 1.0, 1.0, 3.0], [5.0] * 4), made_up([9.0, 1.0, 1.0, 1.0], [5.0] * 4)],
        "Adam": [made_up([9.0, 1.0, 1.0, np.inf], [5.0] * 4), made_up([9.0, 1.0, 1.0, 1.0], [5.0] * 4)],
    }
    lines = table.tuned({"SGD": 1.0, "Adam": 0.3}, {"SGD": (0.1, 1.0), "Adam": (0.1, 0.3, 1.0)})
    assert lines[0] == "SGD: learning rate 1, at the edge of the grid."
    assert lines[1] == "Adam: learning rate 0.3, inside of the grid."
    lines = table.compared(found, 10.0)
    last = next(line for line in lines if line.startswith("Training loss after 10 passes"))
    assert "is lower than `same_batch`; not told apart from `SGD`, `Adam` (" in last
    middle = next(line for line in lines if line.startswith("Training loss after 2 passes"))
    assert "is lower than `same_batch`; higher than `SGD`, `Adam` (" in middle
    rows = {row["method"]: row for row in table.rows(found, 10.0)}
    biased = rows["same_batch"]
    shown = [f"{biased[n]} ± {biased[f'{n}_error']}" for n in ("training_loss_0.5", "training_loss_2", "accuracy")]
    assert shown == ["9.000 ± 0.000", "6.000 ± 0.000", "0.500 ± 0.000"]
    assert (biased["training_loss_10"], biased["training_loss_10_error"]) == ("3.0", "1.0")
    assert (biased["lowest_test_loss"], biased["lowest_test_loss_error"]) == ("3.5", "1.5")
    assert [biased[name] for name in ("seconds", "steps", "accepted", "raised")] == ["4.0", "3.0", "2.0", "1.0"]
    assert rows["Adam"]["training_loss_10"] == "diverged"
    assert rows["SGD"]["steps"] == "3.0"
    assert "accepted" not in rows["SGD"]
    table.draw_figure({"A task": found}, 10.0, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000


def test_the_chosen_rate_is_the_best_on_the_tuning_seeds(tmp_path):
    o = runs.parsed([*TINY, str(tmp_path)])
    records = runs.Records(tmp_path / "30_classes.jsonl", runs.VERSION)
    losses = dict(zip(runs.RATES["SGD"], ((9, 1), (2, 3), (4, 4), (0, np.inf), (np.inf, np.inf)), strict=True))
    for rate, found in losses.items():
        for seed, loss in zip(o.tuning_seeds, found, strict=True):
            assert runs.best_rate("SGD", o, records) is None
            records.append(runs.Run("SGD", None, rate, seed, o.batch, o.passes), training=[9.0, loss])
    assert runs.best_rate("SGD", o, records) == runs.RATES["SGD"][1]
    assert runs.best_rate("SGD", o, runs.Records(records.path, runs.VERSION)) == runs.RATES["SGD"][1]
    assert not runs.Records(records.path, runs.VERSION + 1).found


def test_command_resumes_from_its_cache(tmp_path, capsys):
    runs.main([*TINY, str(tmp_path)])
    findings = json.loads((tmp_path / "newton_runs.json").read_text())
    printed = "\n- ".join(["30 classes, label noise", *findings["30_classes"]])
    assert capsys.readouterr().out == f"{printed}\n"
    assert (tmp_path / "newton_runs.png").stat().st_size > 10_000
    path = tmp_path / "30_classes.jsonl"
    lines = path.read_text().splitlines()
    seeds = [json.loads(line)["key"][3] for line in lines]
    assert sorted(seeds) == [0] * 8 + [1] * 8 + [100] * 10 + [101] * 10
    # the last run is cut off: it alone has no second seed
    path.write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    runs.main([*TINY, str(tmp_path), "--report-only"])
    assert len(path.read_text().splitlines()) == len(lines)
    results = tmp_path / "newton_runs.csv"
    assert "30_classes,Adam," not in results.read_text()
    runs.main([*TINY, str(tmp_path)])
    assert "30_classes,Adam," in results.read_text()
    assert len(path.read_text().splitlines()) == len(lines) + 1


def test_nothing_to_report_and_one_seed_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="No method has all of its 2 seeds"):
        runs.main([*TINY, str(tmp_path), "--report-only"])
    with pytest.raises(SystemExit):
        runs.main(["--seeds", "1", "--cache", str(tmp_path)])
    assert "at least 2" in capsys.readouterr().err
