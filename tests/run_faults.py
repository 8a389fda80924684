"""Check that the tests catch deliberate faults: each entry of `faults.toml` is applied to a copy, one at a time.

The tree is copied once to a temporary directory, where the tests have to pass as it is. Then each fault is applied, its
tests run, and the file is restored. `python tests/run_faults.py [part of a name]` tries all faults or some;
`--tests "tests -m 'not slow'"` runs these tests in place of those that an entry names. The exit code is 1 if a fault is
not caught, or the tests fail without any. Runs are forks of a process that has imported the libraries.
"""

import argparse
import io
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
FORKS = multiprocessing.get_context("forkserver")


def run_pytest(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Return pytest's exit code, and the first failure or the end of the output."""
    multiprocessing.set_start_method(None, force=True)  # the default again, for data loaders
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    os.chdir(tree)
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        code = int(pytest.main([*OPTIONS, *tests]))
    failure = re.search(r"^(FAILED|ERROR) .*", output.getvalue(), re.MULTILINE)
    return code, failure.group() if failure else output.getvalue().strip()[-300:]


def forked(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Run pytest in a process that has imported nothing of the package before."""
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        return pool.submit(run_pytest, tree, tests).result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="part of the names of the faults to try")
    parser.add_argument("--tests", type=shlex.split, help="arguments of pytest in place of the tests of each fault")
    parsed = parser.parse_args()
    toml = __import__("tomllib" if sys.version_info >= (3, 11) else "tomli")  # as pytest itself
    faults = [f for f in toml.loads((ROOT / "tests/faults.toml").read_text())["fault"] if parsed.name in f["name"]]
    FORKS.set_forkserver_preload(["laplace", "matplotlib.pyplot", "netcal", "pandas", "pytest", "sklearn.datasets"])
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT, f"{folder}/tree", ignore=shutil.ignore_patterns(".git", ".*cache", ".venv")))
        code, line = forked(tree, parsed.tests or sorted({test for f in faults for test in f["tests"]}))
        if code:
            sys.exit(f"The tests do not pass without any fault: {line}")
        missed = 0
        for fault in faults:
            before = (path := tree / fault["file"]).read_text()
            if before.count(fault["old"]) != 1:
                sys.exit(f"{fault['name']}: `old` occurs {before.count(fault['old'])} times in {fault['file']}.")
            path.write_text(before.replace(fault["old"], fault["new"]))
            code, line = forked(tree, parsed.tests or fault["tests"])
            path.write_text(before)
            missed += code != 1  # other codes say that the tests could not run
            print(f"{'caught' if code == 1 else 'NOT CAUGHT'}: {fault['name']}\n    {line}", flush=True)
    sys.exit(f"{missed} of {len(faults)} faults were not caught." if missed else 0)
