"""The report as a whole: what its options change, what it says, and that equal inputs give equal bytes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import debiased_laplace.calibration as room
from debiased_laplace.calibration import CalibrationReport, calibration_report
from debiased_laplace.calibration.changes import compare_reports, render_changes
from debiased_laplace.calibration.contents import Estimate
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.metrics.detection import Separation, estimate_auroc


def report(predictions, y, **options):
    return calibration_report(predictions, y, **{"task": "multiclass", "n_resamples": 200, **options})


@pytest.fixture
def data(draw_classification):
    p, y, q = draw_classification(300, sharpness=2.0, seed=11)
    return {"map": p, "laplace": q}, y


def test_options_are_shown_stored_and_saved(data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    figure, table = room.ReportFigure("C", "<svg/>", "an x"), room.ReportTable("t", ["x"], [[np.float32(0.5)], [None]])
    numbers, texts = {"n_bins": 7, "seed": 3, "confidence_level": 0.8}, {"title": "T", "description": "d"}
    options = {"tables": [table], "figures": [figure], "metadata": {"rank": np.int64(4)}, **numbers, **texts}
    options["thresholds"] = {"threshold": [{"metric": "nll", "method": "laplace", "max": 9.0}]}
    options["posteriors"] = {"la": room.PosteriorSummary({}, (0.5, 2.0))}
    found = report(*data, class_names=list("abcdefghij"), **options)
    stored = json.loads(found.to_json(), parse_constant=pytest.fail)
    settings = {"task": "multiclass", "baseline": "map", "n_resamples": 200, **numbers}
    expected = {**texts, "created": "2023-11-14T22:13:20+00:00", "settings": settings, "metadata": {"rank": 4}}
    assert {name: stored[name] for name in expected} == expected
    assert set(stored["software"]) == {"python", "debiased-laplace", "netcal", "torch", "numpy", "matplotlib"}
    assert (found.data.n, found.data.n_classes, found.data.name_class(9)) == (300, 10, "j")
    assert (found.checks[0].status, found.posteriors["la"].prior_precision) == ("passed", (0.5, 2.0))
    assert (found.tables[0].rows, found.figures) == (((0.5,), (None,)), (figure,))
    assert len(found.methods["map"].curves.bins) == 7
    assert set(found.definitions) == {name for m in found.metrics.values() for name in m}
    paths = found.save(tmp_path / "new" / "report", formats=("md", "html", "json", "csv"))
    assert [p.name for p in paths] == [f"report{x}" for x in (".md", ".html", ".json", ".csv", "_comparisons.csv")]
    texts = [found.to_markdown(), found.to_html(), found.to_json(), found.to_csv(), found.to_csv("comparisons")]
    assert [p.read_text(encoding="utf-8") for p in paths] == texts
    assert str(found).splitlines()[1] == found.summary[0]
    assert repr(found).startswith("CalibrationReport(multiclass, n=300, methods: map, map, temp")


def test_a_report_that_cannot_be_written_keeps_all_files_of_the_earlier_one(data, tmp_path: Path, monkeypatch) -> None:
    report(*data, title="One").save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found, write = report(*data, title="Two"), Path.write_bytes

    def on_a_full_disk(path: Path, content: bytes) -> int:
        if path.suffix != ".html":
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        found.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    found.save(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["report.html", "report.json", "report.md"]
    assert all("Two" in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_equal_inputs_give_equal_bytes_and_stay_as_they_were(data, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    (predictions, y), state, one = data, torch.get_rng_state(), report(*data)
    copies = {m: p.clone().requires_grad_(True) for m, p in predictions.items()}
    lists = {m: p.tolist() for m, p in predictions.items()}, y.tolist()
    arrays = {m: p.numpy() for m, p in predictions.items()}, y.numpy()
    renderers = (CalibrationReport.to_json, CalibrationReport.to_html, CalibrationReport.to_markdown)
    for forms in (lists, arrays, (copies, torch.nn.functional.one_hot(y, 10))):
        again = report(*forms)
        assert [f(again) for f in renderers] == [f(one) for f in renderers]
    single = report({m: p.float() for m, p in predictions.items()}, y).metrics["map"]["nll"].known
    assert single == pytest.approx(one.metrics["map"]["nll"].known, abs=1e-6)
    changed = report(predictions, torch.where(torch.arange(300) == 0, (y + 1) % 10, y), seed=1)
    assert changed.data.targets_sha256 != one.data.targets_sha256
    assert changed.metrics["laplace"]["ece_p_value"] != one.metrics["laplace"]["ece_p_value"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    lines = [r.to_json().splitlines() for r in (one, report(*data))]
    assert ["created" in a for a, b in zip(*lines, strict=True) if a != b] == [True]
    assert all(torch.equal(copies[m], p) for m, p in predictions.items())
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ValueError, match=r"SOURCE_DATE_EPOCH.*yesterday"):
        report(*data)


def test_the_first_sentence_judges_against_both_references(data) -> None:
    found, swapped = report(*data), report(*data, baseline="laplace")
    alone = report({"map": data[0]["map"]}, data[1], temperature_scaling="none")
    assert found.summary[0].startswith("laplace is better than map (NLL ")
    assert ", but not detectably different from temperature-scaled map (" in found.summary[0]
    assert swapped.summary[0].startswith("CAUTION, worse than laplace and temperature-scaled laplace: map is worse")
    assert (found.references, swapped.references[0]) == (["map", "map, temperature-scaled"], "laplace")
    assert (alone.comparisons, alone.scaling, alone.summary[0][:9]) == ((), None, "map: NLL ")


def test_no_text_shows_an_interval_that_contradicts_its_verdict(draw_classification) -> None:
    p, y, q = draw_classification(250, sharpness=1.25, seed=14)
    methods = {"map": p, "other": q.roll(1, 0) * 0.03 + 0.97 * p, **{f"m{i}": p ** (1 - i / 40) for i in range(1, 7)}}
    methods = {m: x / x.sum(1, keepdim=True) for m, x in methods.items()}
    found = report(methods, y)
    alone = [c for c in found.comparisons if c.verdict == "no detectable difference" and not c.low <= 0 <= c.high]
    assert alone  # which a reader would take for a contradiction
    for sentence in found.summary:
        for words, low, high in re.findall(r"(better|worse|not detectably)[^()]*\(.*?\[(\S+), (\S+)\]\)", sentence):
            ends = [float(end.replace("\u2212", "-")) for end in (low, high)]
            assert (ends[0] <= 0 <= ends[1]) == (words == "not detectably"), sentence
    rows = [line.split(" | ") for line in found.to_markdown().splitlines() if " detectable difference |" in line]
    assert len(rows) > len(alone)
    assert all("[\u2212" in row[3] for row in rows)
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "exclude 0 exactly where the difference is detected" in text


def test_nothing_hides_that_both_methods_are_worse_than_a_constant_prediction(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=2.0, seed=15, n_classes=4)
    shuffled = p.roll(1, 0)  # sure of what has nothing to do with the input
    methods = {"map": shuffled, "la": 0.6 * shuffled + 0.1, "good": p}
    far = {m: q[:80] ** 3 / (q[:80] ** 3).sum(1, keepdim=True) for m, q in methods.items()}
    found = report(methods, y, ood={"far": far}, temperature_scaling="none", thresholds="default")
    share = found.constant["accuracy"]
    assert share == int(y.bincount().max()) / 300
    assert found.constant["nll"] == pytest.approx(torch.special.entr(y.bincount() / 300).sum().item(), abs=0.02)
    la, constant = found.metrics["la"]["nll"].known, found.constant["nll"]
    assert (found.comparisons[0].verdict, la > constant) == ("better", True)
    assert found.summary[0].startswith("CAUTION, worse than a constant prediction: la is better than map (NLL ")
    assert ", but worse than the class frequencies of the test set alone (NLL " in found.summary[0]
    assert not [sentence for sentence in found.summary if "constant" in sentence and "good" in sentence]
    page = found.to_html()
    assert page.count("worse than a constant: ") == 6  # NLL, Brier score and accuracy of two methods
    for text in (str(found), found.to_markdown(), page):
        plain = text.replace("\\", "")
        assert "which use no inputs: map (NLL" in plain
        assert "far: AUROC below 0.5, worse than chance, of map, predictive entropy (0." in plain
        assert "; good, predictive entropy (0." in plain
    assert found.to_markdown().count("below chance |") == 6  # also in the rows of the baseline
    assert f"Passed, but worse than a constant prediction ({constant:.4g})" in found.checks[0].message
    assert "constant" not in found.checks[1].message
    alone = report({"map": shuffled}, y)
    assert alone.summary[0].startswith("CAUTION, worse than a constant prediction: map: NLL ")
    changes = render_changes(compare_reports(alone, alone), alone, alone)
    assert "**Worse than a constant prediction** in the new report, whatever changed: map (NLL " in changes


def test_regression_is_compared_with_the_moments_of_the_targets(draw_regression) -> None:
    mean, std, y = draw_regression(200, scale=1.0, seed=16)
    methods = {"map": (10 + 0 * mean, std), "la": (5 - mean, 6 * std), "good": (mean, std)}
    found = report(methods, y, task="regression")
    assert found.summary[0].startswith("CAUTION, worse than a constant prediction")
    assert "worse than the mean and standard deviation of the targets alone (NLL " in found.summary[0]
    assert "RMSE 5." in found.summary[0]
    assert not [w for w in found.warnings if "good" in w]
    assert str(found).count("which use no inputs: map (NLL ") == 1
    std = (y - mean).abs() + 0.1
    ordered = report({"a": (mean, 1 / std)}, y, task="regression").warnings
    assert [w for w in ordered if w.startswith("a: its confidence orders its errors worse than chance")]
    constant = report({"a": (mean, 0 * std + 0.8)}, y, task="regression").warnings
    assert not [w for w in constant if "worse than chance" in w]  # no order at all


def test_clusters_reach_every_number_of_a_regression(draw_regression) -> None:
    """Every sample three times over: numbers of the copies are those of the samples, as clusters of one."""
    (mean, std, y), found = draw_regression(200, scale=1.5, seed=12), []
    for k in (1, 3):
        methods = {m: (mean.repeat(k), f * std.repeat(k)) for m, f in (("map", 1.0), ("la", 1.5))}
        options = {"task": "regression", "target_unit": "mm", "clusters": [f"id {i % 200}" for i in range(200 * k)]}
        found.append(report(methods, y.repeat(k), **options))
    for name in ("nll", "crps", "rmse", "z_scale", "picp", "mpiw", "sharpness"):
        a, b = (r.metrics["map"][name] for r in found)
        assert (b.low, b.value, b.high, b.standard_error) == pytest.approx((a.low, a.value, a.high, a.standard_error))
    for a, b in zip(*([c for c in r.comparisons if c.method == "la"][:2] for r in found), strict=True):
        assert (b.low, b.high, b.verdict) == (pytest.approx(a.low), pytest.approx(a.high), "better")
    settings = found[1].settings
    assert "600 samples come in 200 clusters" in str(found[1].warnings)
    assert (found[1].data.target_unit, settings["interval_level"], "n_bins" in settings) == ("mm", 0.9, False)


def test_images_are_clusters_unless_others_are_given(draw_classification) -> None:
    p, y, _ = draw_classification(600, sharpness=1.5, seed=3, n_classes=4)
    images, image = p.reshape(30, 20, 4).movedim(-1, 1).unflatten(-1, (4, 5)), torch.arange(600) // 20
    far, far_images = (0.5 * p[:180].log()).softmax(dim=1), (0.5 * images[:9].log()).softmax(dim=1)
    for clusters, codes in ((None, image), (list(range(15)) * 2, image % 15)):
        options = {"logits": {"net": images.log()}, "clusters": clusters, "ood": {"far": {"net": far_images}}}
        found = report({"net": images}, y.reshape(30, 4, 5), **options)
        rows = report({"net": p}, y, clusters=codes, logits={"net": p.log()})
        scores = (torch.special.entr(x).sum(dim=1) for x in (p, far))
        area = estimate_auroc(Separation(*scores, Units(600, 0.95, codes), Units(180, 0.95, image[:180])))
        pairs = [(area, found.ood["far"].metrics["net"]["entropy"]["auroc"])]
        for name in ("nll", "accuracy", "aurc", "rmsce2_debiased"):
            pairs += [(rows.metrics[m][name], found.metrics[m][name]) for m in rows.methods]
        for a, b in pairs:
            assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), rel=1e-6)
    part = report({"net": images}, y.reshape(30, 4, 5), max_samples=100, ood={"far": {"net": far_images}})
    assert (part.data.n, part.ood["far"].n) == (100, 100)


def test_warnings_tell_of_little_data_and_of_nothing_else(data, draw_regression) -> None:
    (mean, _, y), task = draw_regression(40, scale=1.2, seed=1), {"task": "regression"}
    few = {"n_resamples": 20, "class_names": ["ant", "bee", "cat"], "clusters": list("aabbc")}
    texts = ["Only 5 test samples", "Only 20 resamples", "1 of 3 classes: cat", "Only 3 clusters", "come in 3 clusters"]
    lost = report({"net": [[0.0, 1.0]] + [[0.6, 0.4]] * 99}, [0] * 50 + [1] * 50)
    drawn = report({"m": room.Samples(mean[None].repeat(9, 1), 0.7)}, y, **task)
    cases = [(report({"net": np.full((5, 3), 1 / 3)}, [0, 0, 1, 1, 0], **few), texts)]
    cases += [(lost, ["1 of 100 predictions gave the true"]), (drawn, ["by 9 samples only"])]
    assert [w for found, words in cases for w in words if w not in str(found)] == []
    assert report(*data).warnings == ()
    for one in (report({"a": [0.8], "b": [0.8]}, [1], task="binary"), report({"a": ([1.0], [0.5])}, [1], **task)):
        assert one.metrics["a"]["nll"].low is None  # a single sample
        assert "NaN" not in one.to_json() + one.to_html()


P, Y, F, Q = [[0.4, 0.6], [0.7, 0.3]], [1, 0], {"a": ([1, 0], [1, 2])}, torch.full((2, 2), 0.5)
Z, AB, T = torch.tensor([[0.5, 1.5], [1.5, 0.5]]), {"a": Q, "b": Q}, torch.full((2, 3), 1 / 3)
S = {"a": Z.softmax(dim=1)}


def wrong(message: str, predictions=S, **options):
    return lambda: report(predictions, Y, **options), message


WRONG = {
    "no method": wrong("at least one.*empty", {}),
    "unknown baseline": wrong("'a'; got 'b'", baseline="b"),
    "name with a line break": wrong("printable", {"a\nb": P}),
    "other number of classes": wrong("same classes.*'b': 3", {"a": P, "b": T}),
    "other number of samples": wrong("'b' have 3 rows", {"a": P, "b": [*P, [0.5, 0.5]]}),
    "too few class names": wrong("2 classes; got 1", class_names=["x"]),
    "too few clusters": wrong("each of 2 samples; got 1", clusters=[1]),
    "noise of classes": wrong("belong to task='regression'", observation_noise=0.5),
    "logits of a regression": wrong("logits belong", F, task="regression", logits={"a": P}),
    "NaN in metadata": wrong("finite number in metadata 'x'", metadata={"x": float("nan")}),
    "an infinite end": (lambda: Estimate(0.5, -np.inf, 1.0, 0.1, 5, ""), "Expected finite numbers"),
    "validation without data": wrong("needs validation=", temperature_scaling="validation"),
    "data that are not used": wrong("not use it", temperature_scaling="none", validation=(Q, Y)),
    "other classes of validation": wrong("2 classes.*got 3", validation=(T, Y)),
    "other outputs of validation": wrong("1 outputs.*got 2", F, task="regression", validation=((P, P), P)),
    "neither probabilities nor logits": wrong("sum to 1", validation=(0.5 * Q, Y)),
    "logits of somebody else": wrong("must be its probabilities", logits={"a": Z.flip(1)}),
    "logits of nobody": wrong("mpa", logits={"mpa": Z}),
    "infinite logits": wrong("finite", logits={"a": Z / 0}),
    "the row's name is taken": wrong("rename it", {"a": P, "a, temperature-scaled": P}),
    "a set lacks a method": wrong(r"'a', 'b'\]; got \['a'\]", AB, ood={"far": {"a": Q}}),
    "a set of other classes": wrong("must have the 2 classes of the .* got 3", ood={"far": {"a": T}}),
    "a set of other outputs": wrong("the 1 outputs of the .* got 2", F, task="regression", ood={"far": {"a": (P, P)}}),
    "a set with NaN": wrong("'a on the set far': probabilities must be", ood={"far": {"a": Q / 0 * 0}}),
    "a set of unequal sizes": wrong("must predict the same samples; got", AB, ood={"far": {"a": Q[:1], "b": Q}}),
    "a set without a name": wrong("must be printable text", ood={" ": {"a": Q}}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


ISOLATED = """
import sys, types
package = types.ModuleType("debiased_laplace"); package.__path__ = [{path!r}]
sys.modules["debiased_laplace"] = package  # this room alone, without what the package imports beside it
import debiased_laplace.calibration as room
assert not [m for m in ("netcal", "pyro", "gpytorch", "matplotlib", "laplace") if m in sys.modules]
import pytest
P = [[0.4, 0.6], [0.7, 0.3]]
for predictions, options, expected in (
    ({{"a": P}}, {{"task": "ranking"}}, "task must be one of .'binary'"), ([P], {{}}, "got list"),
    ({{1: P}}, {{}}, "printable text; got 1"), ({{"a": P}}, {{"title": 3}}, "Expected text in title; got int"),
    ({{"a": P}}, {{"ood": [1]}}, "ood must map names"), ({{"a": P}}, {{"validation": P * 2}}, "must be a pair"),
    ({{"a": P}}, {{"temperature_scaling": "yes"}}, "must be one of 'auto'"), ({{"a": P}}, {{}}, "formats must be a"),
):
    with pytest.raises(ValueError, match=expected):
        room.calibration_report(predictions, [1, 0], **{{"task": "binary", **options}}).save("x", formats="html")
assert not [m for m in ("pyro", "gpytorch", "matplotlib.pyplot", "laplace") if m in sys.modules]
"""


@pytest.mark.slow
def test_import_is_light_and_wrong_types_are_value_errors() -> None:
    # in a process of its own nothing heavy is loaded yet, and no type checker steps in before the message
    code = ISOLATED.format(path=str(Path(room.__file__).parents[1]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
