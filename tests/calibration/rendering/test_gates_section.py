import re

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.rendering.gates_section import MAX_BADGES, render_gates

NASTY = '<b onclick="x">&'


def make(draw_classification, n_methods: int, thresholds):
    p, y, _ = draw_classification(150, sharpness=2.0, seed=95)
    methods = {f"{NASTY}{i}": p for i in range(n_methods)}
    options = {"n_resamples": 10, "temperature_scaling": "none", "thresholds": thresholds}
    return calibration_report(methods, y, task="multiclass", **options)


def test_badges_stand_above_the_metrics_and_say_it_in_words(draw_classification) -> None:
    thresholds = [{"metric": "nll", "max": 0.1}, {"metric": "brier", "max": 2}, {"metric": "ece", "max": 0.5}]
    page = make(draw_classification, 1, thresholds).to_html()
    assert page.index('class="verdict"') < page.index('class="badges"') < page.index("<h2>Metrics</h2>")
    badges = re.findall(r'<li class="badge (\w+)"><b>(.) (\w+)</b> ([^<]*)</li>', page)
    assert [badge[:3] for badge in badges] == [
        ("failed", "✗", "failed"),
        ("failed", "✗", "failed"),
        ("passed", "✓", "passed"),
        ("inconclusive", "?", "inconclusive"),
    ]
    assert badges[0][3] == "gates: 1 passed, 1 failed, 1 inconclusive"
    assert "&lt;b onclick=&quot;x&quot;&gt;&amp;0: nll" in badges[1][3]
    assert NASTY not in page
    assert "≤ 0.1" in page


def test_no_thresholds_no_badges(draw_classification) -> None:
    report = make(draw_classification, 1, None)
    assert render_gates(report) == ""
    assert 'class="badge' not in report.to_html()
    assert "gates:" not in report.to_markdown()


def test_many_outcomes_are_counted_and_stay_in_the_table(draw_classification) -> None:
    report = make(draw_classification, MAX_BADGES + 1, [{"metric": "brier", "max": 2}])
    section = render_gates(report)
    assert section.count('class="badge ') == 1
    assert f"gates: {MAX_BADGES + 1} passed" in section
    assert section.count("<tr>") == MAX_BADGES + 2
