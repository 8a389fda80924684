"""`report`, `check` and `compare`: files read and written, and exit codes."""

import json
import struct
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest

from debiased_laplace import calibration_report
from debiased_laplace.cli import main


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def draw(n=300):
    rng = np.random.default_rng(81)
    logits = 1.5 * rng.standard_normal((n, 4))
    return logits, (rng.random((n, 1)) > softmax(logits).cumsum(axis=1)).sum(axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with predictions, two stored reports, and thresholds of every outcome."""
    path = tmp_path_factory.mktemp("gates")
    logits, y = draw()
    for name, (one, two) in {"preds": (2, 1), "worse": (3, 1.5)}.items():
        p = {"map/probs": softmax(one * logits), "laplace/probs": softmax(two * logits)}
        away = {f"ood/noise/{method}": np.full((40, 4), 0.25) for method in p}
        np.savez(path / f"{name}.npz", targets=y, clusters=np.arange(300) // 2, **p, **away)
        arguments = (f"{path}/{name}.npz", "--out", f"{path}/{name}", "--format", "json", "--n-resamples", "50")
        assert main(["report", *arguments]) == 0
    nll = json.loads((path / "preds" / "report.json").read_text())["methods"]["laplace"]["metrics"]["nll"]
    limits = {"passed": 10.0, "failed": 0.01, "inconclusive": (nll["value"] + nll["high"]) / 2}
    for name, limit in limits.items():
        (path / f"{name}.toml").write_text(f'[[threshold]]\nmetric = "nll"\nmethod = "laplace"\nmax = {limit}\n')
    (path / "typo.toml").write_text('[[threshold]]\nmetric = "nlll"\nmax = 1\n')
    digits = "1" + 400 * "0"
    for name, line in {
        "digits": f"max = {digits}",
        "samples": f"max = 1\nmin_samples = {digits}",
        "nested": f"max = {20_000 * '['}",
    }.items():
        (path / f"{name}.toml").write_text(f'[[threshold]]\nmetric = "nll"\n{line}\n')
    (path / "cut.json").write_text((path / "preds" / "report.json").read_text()[:-50])
    return path


CHECK, REPORT = ("check", "preds/report.json", "--thresholds"), ("report", "preds.npz", "--n-resamples", "20", "--out")
RUNS = {
    "passed": ((*CHECK, "passed.toml", "--strict"), 0, "passed."),
    "failed": ((*CHECK, "failed.toml"), 1, "laplace: nll is"),
    "inconclusive": ((*CHECK, "inconclusive.toml"), 0, "inconclusive."),
    "inconclusive, strict": ((*CHECK, "inconclusive.toml", "--strict"), 3, "inconclusive."),
    "unknown metric": ((*CHECK, "typo.toml"), 2, "no metric 'nlll'"),
    "a limit of 401 digits": (
        (*CHECK, "digits.toml"),
        2,
        "'max': Input should be a valid number; got an integer of 13",
    ),
    "a number of samples of 401 digits": ((*CHECK, "samples.toml"), 2, "'min_samples': Input should be less than"),
    "20,000 brackets": ((*CHECK, "nested.toml"), 2, "nested.toml is no TOML"),
    "junit in no folder": ((*CHECK, "passed.toml", "--junit", "no/j.xml"), 2, "there is no folder no"),
    "no thresholds file": ((*CHECK, "nowhere.toml"), 2, "nowhere.toml"),
    "no report": (("check", "preds.npz", "--defaults"), 2, "preds.npz is not JSON"),
    "report with thresholds": ((*REPORT, "o", "--format", "md", "--fail-on", "failed.toml"), 1, "failed."),
    "strict without thresholds": ((*REPORT, "o", "--strict"), 2, "require thresholds; got none"),
    "no file": (("report", "nowhere.npz", "--out", "o"), 2, "nowhere.npz"),
    "another task": ((*REPORT, "o", "--task", "regression"), 2, "has classification predictions"),
    "unknown baseline": ((*REPORT, "o", "--baseline", "x"), 2, "'map'"),
    "a file in the way": ((*REPORT, "passed.toml"), 2, "--out must be a folder"),
    "worse": (("compare", "preds/report.json", "worse/report.json", "--fail-on-worse"), 1, "**Detectably"),
    "worse, as information": (("compare", "preds/report.json", "worse/report.json"), 0, "compared in pairs"),
    "the same": (("compare", "preds/report.json", "preds/report.json", "--fail-on-worse"), 0, "**No detectable"),
    "cut off": (("compare", "preds/report.json", "cut.json"), 2, "cut.json is not JSON"),
}


@pytest.mark.parametrize("case", RUNS)
def test_exit_codes_and_output(folder, monkeypatch, capsys, case) -> None:
    monkeypatch.chdir(folder)
    arguments, code, message = RUNS[case]
    assert main(list(arguments)) == code
    shown = capsys.readouterr()
    assert message in (shown.err if code == 2 else shown.out)


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_process(folder) -> None:
    command = [sys.executable, "-m", "debiased_laplace.cli", *CHECK, "inconclusive.toml", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 3, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("check", "r.json"), ("schema",), ("report", "p", "--out", "o", "--format", "pdf")]
)
def test_arguments_that_the_parser_refuses(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_report_writes_the_requested_formats(folder, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "report"
    arguments = ("--out", f"{out}", "--format", "html,json,md,csv", "--n-resamples", "50", "--title", "A title")
    assert main(["report", f"{folder}/preds.npz", *arguments, "--defaults", "--baseline", "map"]) == 0
    names = {"report.html", "report.json", "report.md", "report.csv", "report_comparisons.csv", "report_ood.csv"}
    assert {path.name for path in out.iterdir()} == names
    shown = capsys.readouterr().out
    assert f"wrote {out / 'report.html'}" in shown
    assert "laplace against map: nll, change" in shown
    document = json.loads((out / "report.json").read_text())
    assert (document["title"], document["task"], document["baseline"]) == ("A title", "multiclass", "map")
    assert [c["metric"] for c in document["checks"]] == ["nll", "accuracy"]
    assert list(document["ood"]) == ["noise"]


def test_junit_is_written(folder, tmp_path) -> None:
    path = tmp_path / "junit.xml"
    arguments = ("--thresholds", f"{folder}/failed.toml", "--junit", f"{path}")
    assert main(["check", f"{folder}/preds/report.json", *arguments]) == 1
    assert ElementTree.parse(path).getroot()[0].get("failures") == "1"


FORMS = {
    "binary": lambda z, y: {"targets": y % 2, "a/probs": softmax(z[:, :2])[:, 1], "b/probs": softmax(z[:, :2])[:, 1]},
    "regression": lambda z, y: {"targets": z[:, 0], "a/mean": z[:, 1], "a/std": np.exp(z[:, 2]), "clusters": y},
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
    "regression of counts": lambda z, y: {"targets": y, "a/rates": np.exp(z.T[:3]), "b/rates": np.exp(z.T[3:])},
    "multiclass with validation": lambda z, y: {
        "targets": y, "a/b/probs": softmax(z), "a/b/logits": z, "validation/logits": z, "validation/targets": y
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_archives(tmp_path, form) -> None:
    np.savez(tmp_path / "p.npz", **FORMS[form](*draw(150)))
    out = tmp_path / "out"
    assert main(["report", f"{tmp_path}/p.npz", "--out", f"{out}", "--format", "json", "--n-resamples", "20"]) == 0
    document = json.loads((out / "report.json").read_text())
    assert document["task"] == form.split()[0]
    if form == "multiclass with validation":
        assert next(iter(document["methods"])) == "a/b"
        assert document["scaling"]["per_fold"] == []
    if form == "regression":
        assert "clusters" in document["methods"]["a"]["metrics"]["nll"]["estimator"]


def test_the_report_equals_that_of_calibration_report(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out = tmp_path / "out"
    assert main(["report", f"{folder}/worse.npz", "--out", f"{out}", "--format", "json", "--seed", "3"]) == 0
    with np.load(folder / "worse.npz") as arrays:
        p, away = (
            {name: arrays[f"{prefix}{name}/probs"] for name in ("map", "laplace")} for prefix in ("", "ood/noise/")
        )
        rest = {"clusters": arrays["clusters"], "ood": {"noise": away}, "seed": 3}
        called = calibration_report(p, arrays["targets"], task="multiclass", **rest)
    assert (out / "report.json").read_text(encoding="utf-8") == called.to_json()


def truncated(path) -> None:
    np.savez(path, targets=np.zeros(1000), **{"a/probs": np.ones((1000, 3))})
    path.write_bytes(path.read_bytes()[:-2000])


def damaged(path) -> None:
    np.savez_compressed(path, targets=np.arange(1000), **{"a/probs": np.random.default_rng(0).random((1000, 3))})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = b"x" * 50
    path.write_bytes(bytes(data))


def a_single_array(path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def with_header(text):
    """Make an archive whose targets have this header and no values."""

    def write(path) -> None:
        header = text.encode() + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("targets.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)

    return write


P, T = np.ones((2, 3)), np.ones(2)
BAD = {
    "a header of a petabyte": (
        with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**15},), }}"),
        "cannot be read",
    ),
    "a header of 40 digits": (
        with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**40},), }}"),
        "cannot be read",
    ),
    "a header of brackets": (with_header("(" * 9000), "cannot be read"),
    "truncated": (truncated, "cannot be read"),
    "damaged": (damaged, "cannot be read"),
    "pickled": ({"targets": np.array([{"a": 1}, None], dtype=object), "a/probs": P}, "pickled"),
    "text": (lambda path: path.write_text("hello"), "expected an .npz file of numbers"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "a single array": (a_single_array, "got a single array"),
    "no targets": ({"a/probs": P}, "expected an array 'targets'; got 'a/probs'"),
    "no predictions": ({"targets": T}, "expected predictions; got 'targets'"),
    "an unknown array": ({"targets": T, "a/prob": P}, "unknown array 'a/prob'"),
    "an array without a method": ({"targets": T, "probs": P}, "unknown array 'probs'"),
    "a set without a method": ({"targets": T, "a/probs": P, "ood/x/probs": P}, "unknown array 'ood/x"),
    "groups": ({"targets": T, "a/probs": P, "groups/site": T}, "unknown array 'groups/site'"),
    "both kinds": ({"targets": T, "a/probs": P, "b/mean": T, "b/std": T}, "of one kind"),
    "a mean alone": ({"targets": T, "a/mean": T}, "do not form a prediction"),
    "a standard deviation alone": ({"targets": T, "a/std": T}, "do not form a prediction"),
    "validation without targets": ({"targets": T, "a/probs": P, "validation/probs": P}, "'targets' in validation/"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_exit_code_2_and_the_error_describes_the_layout(tmp_path, capsys, case) -> None:
    make, message = BAD[case]
    path = tmp_path / "p.npz"
    np.savez(path, **make) if isinstance(make, dict) else make(path)
    assert main(["report", f"{path}", "--out", f"{tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    for words in (message, str(path), "METHOD/probs"):
        assert words in error
    assert not (tmp_path / "out").exists()
