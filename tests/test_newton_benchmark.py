"""The Newton benchmark: its measurements against the public functions, its verdicts, its command on a tiny grid."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from debiased_laplace import newton_step, quadratic_along
from debiased_laplace.demo.digits import load, train

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
newton, newton_table = (importlib.import_module(name) for name in ("newton", "newton_table"))
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
            # a cap that cuts through the directions judged together changes what is judged
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
                seed=draw,
            )
            q = quadratic_along(model, "classification", data, step.update[:, None])
            expected = float(q(torch.ones(1, dtype=q.slopes.dtype)) - q.value)
            assert row["quadratic"][at] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def record(draw, values, loss=-1.0):
    steps = [
        {
            "method": m,
            "shrinkage": s,
            "stopping": t,
            "iterations": 20.0,
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
    lines = newton_table.verdicts(records).splitlines()
    assert "- same_batch is above somewhere: yes: late, batch 128, damping 0.001." in lines
    for text, kept in (
        ("quadratic, same_batch:", 0),
        ("held_out without", 1),
        ("(the default)", 1),
        ("near the min", 1),
    ):
        assert all(f"in {kept} of 1 cells" in line for line in lines if text in line)
    assert "| +2 ± 1 ↑ |" in newton_table.table(records)
    assert "| +0.62 ± 2 |" in newton_table.table(records)
    mean, error = newton_table.mean_and_error(np.array([[1.0], [3.0]]))
    assert (mean.item(), error.item()) == pytest.approx((2.0, 1.0))


def test_command_resumes_from_its_cache(tmp_path, capsys):
    newton.main([*TINY, str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 cells (checkpoint, batch size, damping), 2 draws each" in printed
    assert (tmp_path / "newton_table.md").read_text().strip().endswith(printed.strip()[-200:])
    assert (tmp_path / "figures" / "newton.png").stat().st_size > 10_000
    lines = (tmp_path / "seed-0" / "newton.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [["early", 40, 0.02, draw] for draw in (0, 1)]
    # one draw whole, and one line cut off
    (tmp_path / "seed-0" / "newton.jsonl").write_text(f"{lines[0]}\n{lines[1][:50]}")
    newton.main([*TINY, str(tmp_path)])
    assert capsys.readouterr().out == printed
    assert len((tmp_path / "seed-0" / "newton.jsonl").read_text().splitlines()) == 3


def test_one_draw_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        newton.main([*TINY, str(tmp_path), "--draws", "1"])
    assert "at least 2" in capsys.readouterr().err
