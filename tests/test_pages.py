"""Every code block of the documentation runs as it stands, in the order of its page."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from debiased_laplace import calibration_report
from debiased_laplace.cli import main
from debiased_laplace.demo.digits import network

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|bash|toml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# a network that is trained for a moment, and some of the samples, are enough to see the lines run
SHORTER = {
    'device=torch.device("cpu"))': 'device=torch.device("cpu"), epochs=2)',
    "DataLoader(data.train, ": "DataLoader(torch.utils.data.Subset(data.train, range(96)), ",
    "la.optimize_prior_precision(method=": "la.optimize_prior_precision(grid_size=3, method=",
}
PROJECT = """
from torch.utils.data import DataLoader
from debiased_laplace.demo.digits import load, network

data = load(seed=0)


def model():
    return network(seed=0)


def train_loader():
    return DataLoader(data.curvature, batch_size=64)


def test_loader():
    return DataLoader(data.test, batch_size=64)
"""


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    return [(kind, code) for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


def own_tests() -> str:
    """Text of the tests of single pages, which run their code and check what it gives."""
    paths = [p for p in ROOT.glob("tests/**/test_*page.py") if p != Path(__file__)]
    return "\n".join(path.read_text() for path in [*paths, ROOT / "tests" / "test_readme.py"])


TESTED_APART = [page for page in PAGES if f'"{page.name}"' in own_tests()]
HERE = [page for page in PAGES if blocks(page, "python") and page not in TESTED_APART]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with what the commands of the pages name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_project.py").write_text(PROJECT)
    torch.save(network(seed=0).state_dict(), "trained.pt")
    return tmp_path


def run_commands(script: str) -> list[int]:
    """Run the lines of a script that call this package, and return their exit codes."""
    lines = script.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("debiased-laplace ")]
    return [main(command) for command in commands if command != ["demo"]]  # which has a test of its own


def write_state() -> None:
    (script,) = [code for _, code in blocks(ROOT / "README.md", "bash") if "debiased-laplace fit" in code]
    assert run_commands(script) == [0]


@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:Even the best")
@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, project, monkeypatch):
    names: dict[str, object] = {}
    if any("--state" in code for _, code in blocks(page, "bash")):
        write_state()
    for kind, code in blocks(page, "python", "bash"):
        if kind == "bash":
            assert set(run_commands(code)) <= {0}
            continue
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        exec(code, names)


def test_the_commands_of_the_other_pages_run(project):
    write_state()
    assert (project / "posterior.pt").exists()
    for page in TESTED_APART:
        for _, code in blocks(page, "bash"):
            assert set(run_commands(code)) <= {0}, page


def test_the_page_on_gates_runs(project, capsys):
    page = ROOT / "docs" / "ci_gates.md"
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(600, 4, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = {"map": (1.5 * logits).softmax(1), "laplace": logits.softmax(1)}
    report = calibration_report(found, targets, task="multiclass", n_resamples=20)
    for name in ("report", "old", "new"):
        (project / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
    (project / "thresholds.toml").write_text(blocks(page, "toml")[0][1], encoding="utf-8")
    ((_, script),) = blocks(page, "bash")
    codes = run_commands(script)
    assert codes[0] in (0, 1, 3)  # the thresholds are read, and judged
    assert codes[1:] == [0]
    printed = capsys.readouterr().out
    for metric in ("nll", "accuracy", "ece"):
        assert re.search(rf"^(passed|failed|inconclusive) +.*{metric}", printed, re.MULTILINE), printed
    assert (project / "junit.xml").exists()


def test_every_page_is_run_here_or_has_a_test_of_its_own():
    assert {page.stem for page in HERE} >= {"calibration_reports", "report_metrics", "diagnose"}
    assert {page.stem for page in TESTED_APART} >= {"README", "get_started", "newton_steps"}
