"""`report`, `check`, `compare` and `schema`: exit codes from real processes, the rest in this one."""

import io
import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from debiased_laplace.cli import main


def run(*arguments, cwd):
    command = [sys.executable, "-m", "debiased_laplace.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def draw(n=300):
    rng = np.random.default_rng(81)
    logits = 1.5 * rng.standard_normal((n, 4))
    cumulated = softmax(logits).cumsum(axis=1)
    return logits, (rng.random((n, 1)) > cumulated).sum(axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Predictions, two stored reports, and thresholds of every outcome."""
    path = tmp_path_factory.mktemp("gates")
    logits, y = draw()
    p = {"map/probs": softmax(2 * logits), "laplace/probs": softmax(logits)}
    away = {f"ood/noise/{name}": np.full((40, 4), 0.25) for name in p}
    np.savez(path / "preds.npz", targets=y, **{"groups/site": np.array(["a", "b"] * 150)}, **p, **away)
    np.savez(
        path / "worse.npz", targets=y, **{"map/probs": softmax(3 * logits), "laplace/probs": softmax(1.5 * logits)}
    )
    for name in ("preds", "worse"):
        arguments = (f"{path}/{name}.npz", "--out", f"{path}/{name}", "--format", "json", "--n-resamples", "50")
        assert main(["report", *arguments]) == 0
    nll = json.loads((path / "preds" / "report.json").read_text())["methods"]["laplace"]["metrics"]["nll"]
    middle = (nll["value"] + nll["high"]) / 2
    for name, limit in (("passed", 10.0), ("failed", 0.01), ("inconclusive", middle)):
        (path / f"{name}.toml").write_text(f'[[threshold]]\nmetric = "nll"\nmethod = "laplace"\nmax = {limit}\n')
    (path / "typo.toml").write_text('[[threshold]]\nmetric = "nlll"\nmax = 1\n')
    (path / "cut.json").write_text((path / "preds" / "report.json").read_text()[:-50])
    return path


PROCESSES = {
    "passed": (("check", "preds/report.json", "--thresholds", "passed.toml"), 0, "passed"),
    "failed": (("check", "preds/report.json", "--thresholds", "failed.toml"), 1, "failed"),
    "inconclusive": (("check", "preds/report.json", "--thresholds", "inconclusive.toml"), 0, "inconclusive"),
    "inconclusive, strict": (
        ("check", "preds/report.json", "--thresholds", "inconclusive.toml", "--strict"), 3, "inconclusive"
    ),
    "unknown metric": (("check", "preds/report.json", "--thresholds", "typo.toml"), 2, "no metric 'nlll'"),
    "no thresholds": (("check", "preds/report.json"), 2, "--thresholds"),
    "report with a gate": (("report", "preds.npz", "--out", "o", "--n-resamples", "20", "--format", "md",
                            "--fail-on", "failed.toml"), 1, "failed"),
    "worse": (("compare", "preds/report.json", "worse/report.json", "--fail-on-worse"), 1, "Detectably"),
    "cut off": (("compare", "preds/report.json", "cut.json"), 2, "cut.json is no JSON"),
    "schema": (("schema",), 0, "https://json-schema.org/draft/2020-12/schema"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSES)
def test_exit_codes(folder, case) -> None:
    arguments, code, words = PROCESSES[case]
    done = run(*arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    assert words in (done.stderr if code == 2 else done.stdout)
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_report_writes_what_was_asked_for(folder, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "report"
    arguments = ("--out", f"{out}", "--format", "html,json,md,csv", "--n-resamples", "50", "--title", "A title")
    assert main(["report", f"{folder}/preds.npz", *arguments, "--defaults", "--baseline", "map"]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.html", "report.json", "report.md", "report.csv", "report_comparisons.csv", "report_ood.csv"
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert f"wrote {out / 'report.html'}" in shown
    assert "laplace against map: nll, change" in shown
    document = json.loads((out / "report.json").read_text())
    assert (document["title"], document["task"], document["baseline"]) == ("A title", "multiclass", "map")
    assert [c["metric"] for c in document["checks"]] == ["nll", "accuracy"]
    assert list(document["ood"]) == ["noise"]
    page = (out / "report.html").read_text()
    assert "A title" in page
    assert 'class="badge passed"' in page


def test_junit_is_written(folder, tmp_path, capsys) -> None:
    path = tmp_path / "junit.xml"
    code = main(["check", f"{folder}/preds/report.json", "--thresholds", f"{folder}/failed.toml", "--junit", f"{path}"])
    assert code == 1
    assert ElementTree.parse(path).getroot()[0].get("failures") == "1"
    assert "laplace: nll is" in capsys.readouterr().out


def test_compare_prints_markdown(folder, capsys) -> None:
    assert main(["compare", f"{folder}/preds/report.json", f"{folder}/worse/report.json"]) == 0
    text = capsys.readouterr().out
    assert "The test set is the same; means over samples are compared in pairs" in text
    assert "| map | Negative log-likelihood |" in text
    assert main(["compare", f"{folder}/preds/report.json", f"{folder}/preds/report.json", "--fail-on-worse"]) == 0


FORMS = {
    "binary": lambda z, y: {"targets": y % 2, "a/probs": softmax(z[:, :2])[:, 1], "b/probs": softmax(z[:, :2])[:, 1]},
    "regression": lambda z, y: {"targets": z[:, 0], "a/mean": z[:, 1], "a/std": np.exp(z[:, 2])},
    "regression with noise": lambda z, y: {
        "targets": z[:, :2],
        "a/mean": z[:, 2:],
        "a/covariance": np.tile(np.eye(2), (len(z), 1, 1)),
        "a/observation_noise": np.array(0.5),
    },
    "regression by samples": lambda z, y: {
        "targets": z[:, 0],
        "a/samples": np.random.default_rng(0).standard_normal((20, len(z))),
        "a/observation_noise": np.array(0.5),
    },
    "validation": lambda z, y: {
        "targets": y, "a/probs": softmax(z), "a/logits": z, "validation/logits": z, "validation/targets": y
    },
    "a method with a slash": lambda z, y: {"targets": y, "a/b/probs": softmax(z)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_archives(tmp_path, form) -> None:
    np.savez(tmp_path / "p.npz", **FORMS[form](*draw(150)))
    out = tmp_path / "out"
    assert main(["report", f"{tmp_path}/p.npz", "--out", f"{out}", "--format", "json", "--n-resamples", "20"]) == 0
    document = json.loads((out / "report.json").read_text())
    expected = "multiclass" if form in ("validation", "a method with a slash") else form.split()[0]
    assert document["task"] == expected
    if form == "validation":
        assert document["scaling"]["fitted_on"] == "validation"
    if form == "a method with a slash":
        assert "a/b" in document["methods"]


def test_the_result_is_that_of_the_call(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    from debiased_laplace import calibration_report

    out = tmp_path / "out"
    assert main(["report", f"{folder}/worse.npz", "--out", f"{out}", "--format", "json", "--seed", "3"]) == 0
    with np.load(folder / "worse.npz") as arrays:
        p = {name: arrays[f"{name}/probs"] for name in ("map", "laplace")}
        called = calibration_report(p, arrays["targets"], task="multiclass", seed=3)
    assert (out / "report.json").read_text(encoding="utf-8") == called.to_json()


def truncated(path) -> None:
    np.savez(path, targets=np.zeros(1000), **{"a/probs": np.ones((1000, 3))})
    path.write_bytes(path.read_bytes()[:-2000])


def damaged(path) -> None:
    np.savez_compressed(path, targets=np.arange(1000), **{"a/probs": np.random.default_rng(0).random((1000, 3))})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = b"x" * 50
    path.write_bytes(bytes(data))


def pickled(path) -> None:
    np.savez(path, targets=np.array([{"a": 1}, None], dtype=object), **{"a/probs": np.ones((2, 3))})


def a_single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


P, T = np.ones((2, 3)), np.ones(2)
BAD = {
    "truncated": (truncated, "cannot be read"),
    "damaged": (damaged, "cannot be read"),
    "pickled": (pickled, "pickled"),
    "text": (lambda path: path.write_text("hello"), "pickled objects or is no .npz"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "a single array": (lambda path: path.write_bytes(a_single_array()), "a single array"),
    "no targets": ({"a/probs": P}, "no array 'targets'; there are 'a/probs'"),
    "no predictions": ({"targets": T}, "no predictions"),
    "an unknown array": ({"targets": T, "a/prob": P}, "nothing is known of an array 'a/prob'"),
    "an array without a method": ({"targets": T, "probs": P}, "nothing is known of an array 'probs'"),
    "both kinds": ({"targets": T, "a/probs": P, "b/mean": T, "b/std": T}, "of one kind"),
    "a mean alone": ({"targets": T, "a/mean": T}, "do not go together"),
    "a deviation alone": ({"targets": T, "a/std": T}, "needs either probs"),
    "validation without targets": ({"targets": T, "a/probs": P, "validation/probs": P}, "validation/ has no targets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_exit_code_2_and_say_what_is_expected(tmp_path, capsys, case) -> None:
    make, message = BAD[case]
    path = tmp_path / "p.npz"
    np.savez(path, **make) if isinstance(make, dict) else make(path)
    assert main(["report", f"{path}", "--out", f"{tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert "METHOD/probs" in error
    assert not (tmp_path / "out").exists()


USAGE = {
    "no file": (("report", "nowhere.npz", "--out", "o"), "nowhere.npz"),
    "another task": (("report", "preds.npz", "--out", "o", "--task", "regression"), "holds classification predictions"),
    "unknown baseline": (("report", "preds.npz", "--out", "o", "--baseline", "x"), "'map'"),
    "strict without a gate": (("report", "preds.npz", "--out", "o", "--strict"), "about thresholds; got none"),
    "a file in the way": (("report", "preds.npz", "--out", "passed.toml"), "--out must be a folder"),
    "no report": (("check", "preds.npz", "--defaults"), "not UTF-8"),
    "no thresholds file": (("check", "preds/report.json", "--thresholds", "nowhere.toml"), "nowhere.toml"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_input_is_exit_code_2(folder, monkeypatch, capsys, case) -> None:
    monkeypatch.chdir(folder)
    arguments, message = USAGE[case]
    assert main(list(arguments)) == 2
    assert message in capsys.readouterr().err


def test_unknown_formats_are_refused_by_the_parser(folder, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", f"{folder}/preds.npz", "--out", "o", "--format", "html,pdf"])
    assert stopped.value.code == 2
    assert "html, json, md, csv" in capsys.readouterr().err
