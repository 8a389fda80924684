"""The command line: the demo as a separate process, and what is refused."""

import json
import subprocess
import sys

import pytest

from debiased_laplace.cli import main


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "debiased_laplace.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.slow
def test_demo_prints_a_table_and_writes_a_report(tmp_path):
    done = run("demo", "--seed", "1", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    for name in ("MAP", "same_batch", "debiased", "full batch"):
        assert name in rows, done.stdout
    folder = tmp_path / "demo-report"
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", "report.md"}
    report = json.loads((folder / "report.json").read_text())
    assert set(report["methods"]) == {"MAP", "MAP, temperature-scaled", "same_batch", "debiased", "full batch"}
    assert "nan" not in done.stdout.lower()
    # nobody watches: neither progress bars nor warnings of other libraries
    assert done.stderr == ""


CASES = {
    "a file in the way": (("demo", "--out", "taken"), "must be a folder"),
    "an unknown device": (("demo", "--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    arguments, expected = CASES[case]
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_unknown_commands_are_refused_and_help_lists_the_options(capsys):
    for arguments, code in ((["dance"], 2), (["demo", "--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code
    shown = capsys.readouterr().out
    for option in ("--out", "--seed", "--device"):
        assert option in shown
