"""Examples run, and print the numbers that they claim."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def finished(name: str, *options: str) -> subprocess.CompletedProcess:
    """The example in a process of its own, which has to end well."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_same_batch_against_split(tmp_path):
    figure = tmp_path / "figure.svg"
    options = ["--draws", "2", "--epochs", "5", "--batch", "48", "--figure", str(figure)]
    done = finished("01_same_batch_against_split.py", *options)
    assert "48 of 1200 samples, mean ± standard deviation over 2 draws" in done.stdout
    assert done.stdout.count("KL to the full batch") == 12
    assert "nan" not in done.stdout
    assert figure.read_text().count("<svg") == 1


@pytest.mark.slow
def test_kronecker():
    options = ["--draws", "2", "--epochs", "5", "--batch", "32"]
    done = finished("02_kronecker.py", *options)
    assert "32 of 1200 samples, mean ± standard deviation over 2 draws" in done.stdout
    found = re.findall(
        r"prior precision (\d+), (\w+, \w+, \w+): KL to the full batch (\d+) ± \d+ nats, of an input's logits [\d.]+ ± "
        r"[\d.]+, total variation [\d.]+ ± [\d.]+\n",
        done.stdout,
    )
    assert {prior for prior, _, _ in found} == {"4", "40", "400"}
    assert len({(prior, kind) for prior, kind, _ in found}) == 18


def test_regression_to_the_mean(tmp_path):
    figure = tmp_path / "figure.png"
    done = finished("05_regression_to_the_mean.py", "--draws", "200", "--figure", str(figure))
    found = re.findall(r"batch (\d+), ([\w ]+): same batch ([\d.]+) ± ([\d.]+), split ([\d.]+) ± ([\d.]+)", done.stdout)
    assert len(found) == 12
    for batch, place, same, same_error, split, error in found:
        # twelve tests at once: beyond 3.5 standard errors one in two hundred runs would fail, were draws not seeded
        assert abs(float(split) - 1) < 3.5 * float(error) + 5e-4, (batch, place)
        if int(batch) <= 128:
            distance = float(same) - 1 if place != "last ten" else 1 - float(same)
            assert distance > 5 * float(same_error), (batch, place)
    norms = re.findall(r"squared norm of its gradient: ([\d.]+) ± ([\d.]+), by the formula ([\d.]+)", done.stdout)
    assert len(norms) == 4
    assert all(abs(float(mean) - float(formula)) < 3.5 * float(error) + 5e-4 for mean, error, formula in norms)
    assert figure.stat().st_size > 10_000


def test_regression_report(tmp_path):
    done = finished("03_regression_report.py", "--folder", str(tmp_path))
    function, noise = map(float, re.search(r"function: ([\d.]+) points, noise: ([\d.]+) points", done.stdout).groups())
    assert 0.05 < function**2 / (function**2 + noise**2) < 0.2
    assert float(re.search(r"MAP 1.00, Laplace ([\d.]+)", done.stdout)[1]) > 1.05
    change, low, high = re.search(r"nll of Laplace minus MAP: (\S+) \[(\S+), (\S+)\], no detect", done.stdout).groups()
    assert float(low) < float(change) < float(high)
    assert abs(float(change)) < 0.02
    page = (tmp_path / "report.html").read_text()
    assert "constant predictive standard deviation" in page
    assert "root mean squared error (points)" in page


@pytest.mark.slow
def test_quadratic_in_a_plane(tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--draws", "8", "--epochs", "20", "--figure", str(figure)]
    done = finished("07_quadratic_in_a_plane.py", *options)
    own, split, full = map(
        float,
        re.search(
            r"first eigenvector: curvature on the batch ([\d.]+) .*, by the split ([\d.]+) .*, on all data ([\d.]+) ",
            done.stdout,
        ).groups(),
    )
    assert own > 1.05 * full
    assert abs(split - full) < own - full
    promised, found, best = map(
        float,
        re.search(r"promised (-?[\d.e-]+) .*, on all data (-?[\d.e-]+) .*at most (-?[\d.e-]+) ", done.stdout).groups(),
    )
    assert promised > found
    assert best >= found
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_how_biased_is_a_batch(tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--draws", "2", "--epochs", "5", "--sizes", "24", "48", "--figure", str(figure)]
    done = finished("06_how_biased_is_a_batch.py", *options)
    assert done.stdout.startswith("The first curvature of a batch of 24 is ")
    assert "nats gained by debiasing" in done.stdout
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_curvature_over_eigenvectors(tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--draws", "6", "--epochs", "100", "--batch", "64", "--figure", str(figure)]
    done = finished("08_curvature_over_eigenvectors.py", *options)
    assert done.stdout.startswith("batches of 64 of 1200, 6 draws; ")
    rows = re.findall(
        r"(.+): first ([\d.e-]+) ± ([\d.e-]+), first ten ([\d.e-]+) ± [\d.e-]+, number \d+ ([\d.e-]+) ± ([\d.e-]+)\n",
        done.stdout,
    )
    found = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    assert set(found) == {"a half of 32, as it sees itself", "same_batch", "held_out", "cross_fitted"}
    for biased in ("a half of 32, as it sees itself", "same_batch"):
        first, first_error, ten, last, last_error = found[biased]
        assert first - 1 > 3 * first_error, biased
        assert ten > 1, biased
        assert 1 - last > 3 * last_error, biased
    first, first_error, _, last, last_error = found["held_out"]
    assert abs(first - 1) < 3.5 * first_error
    assert abs(last - 1) < 3.5 * last_error
    # cross-fitting may keep a part of the bias, but no more than a part
    assert abs(found["cross_fitted"][0] - 1) < found["same_batch"][0] - 1
    assert abs(found["cross_fitted"][3] - 1) < 1 - found["same_batch"][3]
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_conjugate_gradients(tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--draws", "6", "--figure", str(figure)]
    done = finished("09_conjugate_gradients.py", *options)
    number = r"([+-]\d+\.\d+) ± (\d+\.\d+)"
    rows = re.findall(
        rf"(.+): change of the quadratic {number} after 1, {number} after 5, {number} after 20; above the start",
        done.stdout,
    )
    at_the_end = {row[0]: float(row[5]) for row in rows}
    error = {row[0]: float(row[6]) for row in rows}
    assert len(rows) == 6
    full = float(re.search(r"all data: change of the quadratic .*, (\S+) after 20\n", done.stdout)[1])
    assert at_the_end["same_batch"] > 3 * error["same_batch"]
    assert at_the_end["same_batch believes"] < full
    for kind in ("held_out", "cross_fitted"):
        shrunk = f"{kind}, shrinkage"
        assert at_the_end[shrunk] < at_the_end[kind] < 0.2 * at_the_end["same_batch"]
    assert full < at_the_end["cross_fitted, shrinkage"] < error["cross_fitted, shrinkage"]
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_laplace_against_the_full_batch(tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--draws", "2", "--epochs", "100", "--batch", "64", "--figure", str(figure)]
    done = finished("10_laplace_against_the_full_batch.py", *options)
    rows = re.findall(
        r"prior precision (\d+), (\w+): KL to the full batch ([\d.]+) ± [\d.]+ nats, total variation ([\d.]+) ± "
        r"[\d.]+, standard deviation / full batch's ([\d.]+) ± [\d.]+, off by ([\d.]+) ± [\d.]+ %\n",
        done.stdout,
    )
    found = {(prior, kind): tuple(map(float, numbers)) for prior, kind, *numbers in rows}
    assert len(found) == 9
    for prior in ("4", "40"):
        biased, debiased = (found[prior, kind] for kind in ("same_batch", "cross_fitted"))
        for place in (0, 1, 3):
            assert debiased[place] < biased[place], (prior, place)
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_ordinal():
    done = finished("11_ordinal.py")
    number = r"(-?[\d.]+)"
    numbers = re.findall(f"{number} nats; the network alone {number}, a difference of {number} ± {number}", done.stdout)
    ((averaged, alone, difference, error),) = (tuple(map(float, found)) for found in numbers)
    assert averaged == pytest.approx(1.66, abs=0.1)
    assert alone == pytest.approx(2.2, abs=0.2)
    assert difference < -3 * error
    assert "DebiasedLowRankLaplace(ordinal, " in done.stdout


@pytest.mark.slow
def test_segmentation():
    done = finished("12_segmentation.py", "--epochs", "4", "--rows", "200")
    ((rows, share, pixels),) = re.findall(
        r"(\d+) of 1,408,000 rows; (\d+)% of them at the rim of a digit, as are (\d+)% of the pixels", done.stdout
    )
    assert 150 < int(rows) < 250
    assert int(share) > 2 * int(pixels)
    assert re.search(r"laplace: negative log-likelihood of a pixel [\d.]+ ± [\d.]+, ECE [\d.]+", done.stdout)
