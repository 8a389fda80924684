"""The Newton benchmark: its measurements against the public functions, its verdicts, its command on a tiny grid."""

import json
import re

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from benchmarks import newton, newton_table, newton_tasks
from debiased_laplace import newton_step, quadratic_along
from debiased_laplace.demo.digits import load, train

TINY = ["--quick", "--checkpoints", "early", "--batch-sizes", "40", "--dampings", "0.02", "--cache"]


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        newton.main(["--help"])
    assert "--quick" in capsys.readouterr().out


def test_what_is_measured_is_what_the_package_gives():
    """At the end of a step, and after as many iterations as a cap of that many allows."""
    data = load(0).train.tensors
    X, y = data
    model = train(load(0), 0, torch.device("cpu"), epochs=1)
    before = parameters_to_vector(model.parameters()).clone()
    n, damping, draw = 60, 0.03, 1
    rows = newton.measure(model, data, n, damping, draw)
    assert torch.equal(parameters_to_vector(model.parameters()), before)
    some = torch.randperm(len(X), generator=torch.Generator().manual_seed(draw))[:n]
    assert len(rows) == 10
    for row in rows:
        for at, cap in ((newton_table.POINTS.index(5), 5), (-1, newton_table.POINTS[-1])):
            # a cap that cuts through directions taken together changes what is taken
            if not row["shrinkage"] or (row["stopping"] == "held_out") == (cap == 5):
                continue
            step = newton_step(
                model,
                "classification",
                (X[some], y[some]),
                damping,
                row["method"],
                shrinkage=row["shrinkage"],
                stopping=row["stopping"],
                max_iterations=cap,
                n_data=len(X),
                seed=draw,
            )
            q = quadratic_along(model, "classification", data, step.update[:, None])
            expected = float(q(torch.ones(1, dtype=q.slopes.dtype)) - q.value)
            assert row["quadratic"][at] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # along directions taken together there is no end before their last iteration
    stopped = newton_step(model, "classification", (X[:600], y[:600]), damping, n_data=len(X), seed=draw)
    assert max(stopped.passes[0].iterations) > 1
    done = torch.tensor(stopped.passes[0].iterations).cumsum(0)
    found = newton.reached(stopped.passes[:1])
    for i, point in enumerate(newton_table.POINTS):
        one = stopped.passes[0]
        whole = done <= point
        torch.testing.assert_close(found[:, i], one.directions[:, whole] @ one.step_lengths[whole].float())


def but_for_seconds(printed: str) -> str:
    """What the same steps print whenever they are taken."""
    assert "of its seconds" in printed
    return re.sub(r"[0-9.]+ of its seconds in the median cell, [0-9.]+ at most", "", printed)


def record(draw, values, loss=-1.0):
    steps = [
        {
            "method": m,
            "shrinkage": s,
            "stopping": t,
            "iterations": 20.0,
            "gradients": {"same_batch": 40.0, "held_out": 30.0, "cross_fitted": 44.0}[m],
            "seconds": 2.0,
            "quadratic": [values[m]] * 7,
            "loss": [loss] * 7,
        }
        for m, s, t in [
            (m, s, t)
            for m in ("same_batch", "held_out", "cross_fitted")
            for s in (False, True)
            for t in (("none",) if m == "same_batch" else ("none", "held_out"))
        ]
    ]
    return {"version": newton.VERSION, "key": ["late", 128, 1e-3, draw], "steps": steps}


def test_verdicts_of_known_changes():
    """Draws of 1 and 3: mean 2, standard error 1. Draws of -1 and 2.25: mean 0.625, standard error 1.625."""
    records = [
        record(0, {"same_batch": 1.0, "held_out": -1.0, "cross_fitted": -1.0}),
        record(1, {"same_batch": 3.0, "held_out": 2.25, "cross_fitted": -1.5}, loss=-2.0),
    ]
    lines = newton_table.verdicts(records)
    assert "same_batch is above somewhere: yes: late, batch 128, damping 0.001." in lines
    for text, kept in (
        ("quadratic, same_batch:", 0),
        ("held_out without", 1),
        ("(the default)", 1),
        ("near the min", 1),
    ):
        assert all(f"in {kept} of 1 cells" in line for line in lines if text in line)
    biased, _, held_out, *_ = newton_table.rows(records)
    assert (biased["q_10"], biased["q_10_error"], biased["above"]) == ("+2", "1", "q_1 q_3 q_10 q_20")
    assert (held_out["q_stopped"], held_out["q_stopped_error"], held_out["above"]) == ("+0.62", "2", "")
    assert all(set(row) <= set(newton_table.COLUMNS) for row in newton_table.rows(records))
    cells = [newton_table.Cell(checkpoint, n, 0.1) for checkpoint in ("early", "late") for n in range(4)]
    assert newton_table._listed(cells).startswith(": early, batch 0, damping 0.1; early, batch 1")
    assert newton_table._listed([*cells, newton_table.Cell("late", 9, 0.1)]) == ": early 4, late 5"
    mean, error = newton_table.mean_and_error(np.array([[1.0], [3.0]]))
    assert (mean.item(), error.item()) == pytest.approx((2.0, 1.0))


@pytest.mark.parametrize(("task", "folder"), [("digits", "seed-0"), ("30_classes", "30_classes-seed-0")])
def test_command_resumes_from_its_cache(task, folder, tmp_path, capsys):
    tiny = ["--tasks", task, *TINY, str(tmp_path)]
    newton.main(tiny)
    printed = capsys.readouterr().out
    assert "1 cells (checkpoint, batch size, damping), 2 draws each" in printed
    findings = json.loads((tmp_path / "newton.json").read_text())
    assert printed == "\n- ".join([newton_tasks.TASKS[task], *findings[task]]) + "\n"
    assert len((tmp_path / "newton.csv").read_text().splitlines()) == 1 + 6
    figure = "newton.png" if task == "digits" else f"newton_{task}.png"
    assert (tmp_path / figure).stat().st_size > 10_000
    path = tmp_path / folder / "newton.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [["early", 40, 0.02, draw] for draw in (0, 1)]
    # one draw whole, and one line cut off
    path.write_text(f"{lines[0]}\n{lines[1][:50]}")
    newton.main(tiny)
    assert but_for_seconds(capsys.readouterr().out) == but_for_seconds(printed)
    assert len(path.read_text().splitlines()) == 3


def test_a_task_without_whole_cells_is_left_out_of_a_report(tmp_path, capsys):
    key = ["early", 40, 0.02]
    steps = record(0, dict.fromkeys(newton_table._METHODS, -1.0))["steps"]
    for draw in (0, 1):
        newton.Records(tmp_path / "30_classes-seed-0" / "newton.jsonl", newton.VERSION).append(
            (*key, draw), steps=steps
        )
    newton.main([*TINY, str(tmp_path), "--report-only"])
    printed = capsys.readouterr().out
    assert printed.startswith("30 classes, label noise\n- Measured in 1 of 1 cells")
    assert "Digits" not in printed
    with pytest.raises(SystemExit, match="No cell has all of its 2 draws"):
        newton.main(["--tasks", "digits", *TINY, str(tmp_path), "--report-only"])


def test_a_checkpoint_is_trained_once(tmp_path):
    task = newton_tasks.newton_task("30_classes", 0)
    X, y = task.train
    model = newton_tasks.checkpoint(tmp_path, "30_classes", "early", 0)
    assert not model.training
    with torch.no_grad():
        trained, initial = (float(torch.nn.functional.cross_entropy(m(X), y)) for m in (model, task.network()))
    assert trained < initial - 0.1
    stored = torch.load(tmp_path / "early-0.pt", weights_only=True)
    stored["0.bias"] += 1
    torch.save(stored, tmp_path / "early-0.pt")
    again = newton_tasks.checkpoint(tmp_path, "30_classes", "early", 0)
    torch.testing.assert_close(again[0].bias, model[0].bias + 1)


def test_one_draw_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        newton.main([*TINY, str(tmp_path), "--draws", "1"])
    assert "at least 2" in capsys.readouterr().err
