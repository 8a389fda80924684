"""The page: well formed, self-contained, accessible, and safe whatever texts and figures it is given."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hostile_texts import HOSTILE, SVG, TEXT
from matplotlib.figure import Figure

from debiased_laplace.calibration import CalibrationReport, ReportFigure, ReportTable, Samples, calibration_report
from debiased_laplace.calibration.formatting import format_number
from debiased_laplace.calibration.svg import draw_svg

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALLOWED = re.compile(
    "html|head|meta|title|style|body|main|header|h1|h2|h3|p|div|ul|li|b|a|table|thead|tbody|tr|th|td|span|figure|"
    "figcaption|details|summary|dl|dt|dd|code|img|svg|g|path|text|use|defs|clippath|rect"
)


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text outside of tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.elements if name == tag]


@pytest.fixture(scope="session")
def regression() -> CalibrationReport:
    """Three outputs in a hostile unit, a constant spread, and a mixture."""
    g = torch.Generator().manual_seed(22)
    mean = torch.randn(200, 3, generator=g, dtype=torch.float64)
    std = 0.5 + torch.rand(200, 3, generator=g, dtype=torch.float64)
    y = mean + 2 * std * torch.randn(200, 3, generator=g, dtype=torch.float64)
    drawn = mean + 0.2 * torch.randn(20, 200, 3, generator=g, dtype=torch.float64)
    given = {"map": (mean, torch.ones_like(mean)), "pair": (mean, std), "drawn": Samples(drawn, observation_noise=0.9)}
    far = {m: (p[0][:40], 3 * p[1][:40]) for m, p in given.items() if m != "drawn"}
    far["drawn"] = Samples(2 * drawn[:, :40], observation_noise=0.9)
    return calibration_report(
        given, y, task="regression", target_unit="<km/h> $x$ 模型", ood={"far": far}, n_resamples=50
    )


@pytest.fixture(scope="session")
def single() -> CalibrationReport:
    """One binary method, a right one of few samples."""
    g = torch.Generator().manual_seed(23)
    p = torch.rand(80, generator=g, dtype=torch.float64)
    return calibration_report({"map": p}, (torch.rand(80, generator=g, dtype=torch.float64) < p).long(), task="binary")


@pytest.fixture(scope="session")
def pages(hostile_report, regression, single) -> dict[str, str]:
    return {"hostile": hostile_report.to_html(), "regression": regression.to_html(), "single": single.to_html()}


@pytest.mark.parametrize("name", ["hostile", "regression", "single"])
def test_page_is_well_formed_self_contained_and_accessible(pages, name: str) -> None:
    source = pages[name]
    page = Page(source)
    assert page.open == []  # every element was closed in order
    assert all(ALLOWED.fullmatch(tag) for tag, _ in page.elements)
    assert len(page.attributes("style")) == 1
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    equivalents = [a for a in page.attributes("meta") if "http-equiv" in a]
    assert equivalents == [{"http-equiv": "Content-Security-Policy", "content": policy}]
    for tag, attributes in page.elements:
        assert not [k for k in attributes if k.startswith("on")]
        loads = [v for k, v in attributes.items() if k in ("src", "srcset", "data", "xlink:href", "href", "action")]
        if tag == "a":
            assert all(v.startswith(("#", "https://doi.org/", "https://arxiv.org/abs/")) for v in loads)
        else:
            assert all(v.startswith(("#", "data:image/svg+xml;base64,")) for v in loads), (tag, loads)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", source)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = [a["href"][1:] for _, a in page.elements if (a.get("href") or "").startswith("#")]
    assert set(used) | set(re.findall(r"url\(#([^)]*)\)", source)) <= set(ids)
    pictures = page.attributes("svg")
    assert len(pictures) >= 2
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in pictures)
    assert all(a["alt"] for a in page.attributes("img"))
    assert source.count("<summary>The same as tables</summary>") == source.count('<div class="panels">')
    assert len(source.encode()) < 700 * 1024


def test_hostile_texts_are_shown_as_they_are(pages, hostile_report) -> None:
    page = Page(pages["hostile"])
    shown = [" ".join(word.split()) for word in page.words if TEXT in " ".join(word.split())]
    # title twice, paragraph, findings, headline, tables, figures, metadata, set, posterior, note, classes, ...
    assert len(shown) > 25
    assert "second paragraph" in "".join(page.words)
    labels = [a["aria-label"] for a in page.attributes("svg")]
    assert sum(TEXT in label for label in labels) >= 5
    written = [word for word in page.words if word.startswith(HOSTILE[0][:15])]
    assert any(word.endswith(("better", "worse", "not detectable")) for word in written)  # inside a figure
    assert "49" not in "".join(word for word in page.words if "7 * 7" in word)


def test_figures_of_the_caller_are_images_that_cannot_act(pages, hostile_report) -> None:
    page = Page(pages["hostile"])
    images = [a["src"] for a in page.attributes("img")]
    assert len(images) == 2
    assert "script" not in "".join(tag for tag, _ in page.elements)
    for a, figure in zip(images, hostile_report.figures, strict=True):
        assert base64.b64decode(a.split(",")[1]).decode() == figure.svg
    # and so are those of a stored report that somebody else wrote
    document = json.loads(hostile_report.to_json())
    for definition in document["definitions"].values():
        definition |= {"label": TEXT, "meaning": TEXT, "reference": f"{TEXT} doi:10.1/<script>x()</script>"}
    document |= {"created": TEXT, "software": {TEXT: TEXT}, "warnings": [TEXT], "summary": [TEXT]}
    document["ood"][TEXT]["detections"][0]["score"] = TEXT
    other = Page(CalibrationReport.from_json(json.dumps(document)).to_html())
    assert all(ALLOWED.fullmatch(tag) for tag, _ in other.elements)
    assert all(a["href"].startswith(("#", "https://doi.org/", "https://arxiv.org/abs/")) for a in other.attributes("a"))
    assert not [k for _, a in other.elements for k in a if k.startswith("on")]


def test_a_stored_report_gives_the_same_page(hostile_report, regression, pages) -> None:
    for name, report in (("hostile", hostile_report), ("regression", regression)):
        assert CalibrationReport.from_json(report.to_json()).to_html() == pages[name]


def test_every_number_and_its_definition_are_on_the_page(hostile_report, pages) -> None:
    words = " ".join(Page(pages["hostile"]).words)
    for name, estimate in hostile_report.metrics["map"].items():
        assert name in words  # defined
        if not name.endswith(("_noise_floor", "_p_value")) and estimate.low is not None:
            assert f"{estimate.value:.2f}"[:5].replace("-", "\u2212") in words, name
    assert "better than map" in words
    assert "over-confident" in words
    for b in hostile_report.methods["map"].curves.bins:
        if b.n:
            assert format_number(b.accuracy) in words
    gates = re.findall(r'<li class="badge (\w+)"><b>(.) (\w+)</b>', pages["hostile"])
    assert {g[0] for g in gates} == {"failed", "passed", "inconclusive"}
    assert "gates: 2 passed, 2 failed, 2 inconclusive" in words
    assert words.index("better than map") < words.index("gates:") < words.index("Metrics")


def test_posteriors_are_told_in_words_numbers_and_figures(pages) -> None:
    source = pages["hostile"]
    words = " ".join(Page(source).words)
    for shown in ("3\u202f254", "312", "closer", "\u2212120", "p < 0.001", "linearized, mc", "1.2 s", "3 MiB"):
        assert shown in words, shown
    labels = [a["aria-label"] for a in Page(source).attributes("svg")]
    assert any("2.000 along the first" in label for label in labels)
    # 1e4 / 15² = 44.4
    assert any("the prior precision is 40," in x and "above it up to about place 15" in x for x in labels)


def test_sections_are_there_only_where_they_have_something_to_say(pages) -> None:
    for heading in ("Out of distribution", "The posteriors", "How the methods predicted", "Differences to"):
        assert f"<h2>{heading}" in pages["hostile"]
    for heading in ("Out of distribution", "The posteriors", "How the methods predicted", "Coverage"):
        assert f"<h2>{heading}" not in pages["single"]
    for heading in ("Reliability", "Accuracy and calibration by class"):
        assert f"<h2>{heading}" in pages["single"]
        assert f"<h2>{heading}" not in pages["regression"]
    assert "<code>fpr95</code>" not in pages["single"]
    assert 'class="badge' not in pages["single"]


def test_regression_panels_are_told_in_words(regression, pages) -> None:
    labels = [a["aria-label"] for a in Page(pages["regression"]).attributes("svg")]
    bins = [b for b in regression.methods["pair"].curves.spread if b.output == 0]
    outside = sum(not b.consistent_low <= b.observed <= b.consistent_high for b in bins)
    assert outside > 5
    assert any("pair, output 0" in x and f"{outside} of {len(bins)} bins outside the usual range" in x for x in labels)
    assert "(&lt;km/h&gt; $x$ 模型)²" in pages["regression"]  # of the squared errors
    assert "predicted standard deviation (&lt;km/h&gt; $x$ 模型)" in pages["regression"]


@pytest.mark.parametrize("n_sets", [12, 14])
def test_many_sets_are_not_all_drawn(draw_classification, n_sets: int) -> None:
    p, y, _ = draw_classification(80, sharpness=1.0, seed=44)
    g = torch.Generator().manual_seed(0)
    sets = {f"set {i}": {"map": torch.rand(20, 10, generator=g).softmax(dim=1)} for i in range(n_sets)}
    page = calibration_report({"map": p}, y, task="multiclass", n_resamples=20, ood=sets).to_html()
    assert ("12 histograms are drawn" in page) == (n_sets > 12)
    assert len(re.findall(r' id="ood-\d+-\d+"', page)) == 12


def test_figures_follow_the_colours_of_the_page(pages) -> None:
    assert "prefers-color-scheme: dark" in pages["hostile"]
    assert "@media print" in pages["hostile"]
    for picture in re.findall(r"<svg.*?</svg>", pages["hostile"], re.DOTALL):
        assert "#000000" not in picture
        assert "#ffffff" not in picture
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([0, 1], [0, 1], color="black", marker="o")
    figure.axes[0].set_title("words", parse_math=False)
    svg = ReportFigure.from_matplotlib("title", figure, alt="a line", note="n").svg
    assert svg == draw_svg(figure)  # the same bytes again
    assert ">words</text>" in svg
    assert "prefers-color-scheme: dark" in svg
    assert "currentColor" in svg
    assert "#000000" not in svg


REFUSED = {
    "a figure without alternative": (lambda: ReportFigure("title", SVG, alt=" "), "text alternative"),
    "a figure without svg": (lambda: ReportFigure("title", "<div></div>", alt="words"), "<svg>"),
    "a row too long": (lambda: ReportTable("t", ["a"], [[1, 2]]), "1 columns, but row 0 has 2 cells"),
    "a cell without number": (lambda: ReportTable("t", ["a"], [[float("nan")]]), "row 0 of table 't'"),
    "a list in a cell": (lambda: ReportTable("t", ["a"], [[[1]]]), "got list"),
    "text for a row": (lambda: ReportTable("t", ["a"], ["x"]), "a sequence of cells in table 't'; row 0 is 'x'"),
    "a surrogate": (lambda: ReportTable("\ud800", ["a"], []), "Expected text in the title of a table; got a surrogate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_figure_or_table_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "text"), [(1.87e-6, "+1.87e\u221206"), (-1.87e-6, "\u22121.87e\u221206"), (0.0, "0")]
)
def test_numbers_with_an_exponent_keep_their_sign(value: float, text: str) -> None:
    assert format_number(value, signed=True) == text


WRAPPER = """<!DOCTYPE html><body><iframe id="page" src="{name}" style="width:360px;height:700px;border:0"></iframe>
<script>window.onload = () => {{
  const d = document.getElementById("page").contentDocument;
  const wide = [...d.querySelectorAll("main *")].filter(e => !e.closest(".scroll") && !e.closest("svg")
    && e.getBoundingClientRect().right > 360.5).length;
  const box = d.querySelector(".scroll");
  document.body.setAttribute("data-found", [d.documentElement.scrollWidth, d.body.scrollWidth, wide,
    box ? box.scrollWidth > box.clientWidth : "none", d.querySelectorAll("svg").length].join(" "));
}};</script></body>"""
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run", "--hide-scrollbars"]


def open_browser(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, *QUIET, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def browse(page: Path) -> tuple[list[str], str]:
    """Measure a page in a frame of 360 pixels, and return what the browser logged."""
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(WRAPPER.format(name=page.name), encoding="utf-8")
    log = ["--allow-file-access-from-files", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"]
    run = open_browser(wrapper, *log, "--window-size=800,800", "--dump-dom")
    return re.search(r'data-found="([^"]*)"', run.stdout)[1].split(), run.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_browser_shows_the_page_on_a_phone_without_sideways_scrolling(pages, tmp_path: Path) -> None:
    for name, source in pages.items():
        (tmp_path / "report.html").write_text(source, encoding="utf-8")
        (width, body, wide, _, pictures), log = browse(tmp_path / "report.html")
        assert (width, body, wide) == ("360", "360", "0"), name
        assert int(pictures) >= 2
        assert "CONSOLE" not in log
    (tmp_path / "bad.html").write_text("<main><p style='width:500px'>x</p></main><script>nothing()</script>")
    (width, _, wide, _, _), log = browse(tmp_path / "bad.html")
    assert int(width) > 360  # the measurement sees a page that is too wide, and an error of its script
    assert wide == "1"
    assert "CONSOLE" in log


def photograph(page: Path) -> list[str]:
    """Take a picture of a page, and return the addresses that it requested, without the browser's own requests."""
    log = page.with_suffix(".net.json")
    open_browser(page, "--window-size=1100,2400", f"--screenshot={page.with_suffix('.png')}", f"--log-net-log={log}")
    started = re.findall(
        r'"initiator":"([^"]*)"[^{}]*(?:\{[^{}]*\})?[^{}]*"url":"(http[^"]*)"', log.read_text(errors="replace")
    )
    return [url for initiator, url in started if initiator != "not an origin"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_asks_the_network_for_nothing_and_is_kept_as_a_picture(pages, tmp_path: Path) -> None:
    """The pictures stay in pytest's folder of the last runs, for a look at them."""
    for name, source in pages.items():
        page = tmp_path / f"{name}.html"
        page.write_text(source, encoding="utf-8")
        assert photograph(page) == [], name
        assert page.with_suffix(".png").stat().st_size > 50_000
    curious = tmp_path / "curious.html"
    curious.write_text("<img src='http://127.0.0.1:9/picture.png'>")
    assert photograph(curious) == ["http://127.0.0.1:9/picture.png"]
