import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from debiased_laplace.calibration import ReportFigure, ReportTable, calibration_report
from debiased_laplace.calibration.rendering.formatting import format_number

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<b onclick=x>&\"' $\\sigma$ 模型</b>"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 90"><g id="a"><text>x</text></g><use href="#a"/></svg>'


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
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


@pytest.fixture
def reports(draw_classification, draw_regression):
    p, y, _ = draw_classification(400, sharpness=2.0, seed=21)
    q, _, _ = draw_classification(400, sharpness=1.0, seed=21)
    mean, std, t = draw_regression(200, scale=1.3, seed=22)
    extra = {
        "title": NASTY,
        "description": f"{NASTY}\n\nsecond paragraph",
        "metadata": {NASTY: NASTY, "rank": 8, "a very long name without any space " + "x" * 80: 0.1},
        "tables": [ReportTable(NASTY, [NASTY, *"abcdefgh"], [[NASTY, *[123456.789] * 8]], note=NASTY)],
        "figures": [ReportFigure(NASTY, SVG, NASTY, note=NASTY)] * 2,
    }
    b, z, _ = draw_classification(300, sharpness=1.5, seed=23, n_classes=2)
    return {
        "multiclass": calibration_report(
            {"map": p, NASTY: q, "third " + "y" * 60: q}, y, task="multiclass", class_names=[NASTY] * 10, **extra
        ),
        "binary": calibration_report({"map": b[:, 1]}, z, task="binary"),
        "regression": calibration_report({"map": (mean, std), NASTY: (mean, 1.3 * std)}, t, task="regression", **extra),
    }


TASKS = ["multiclass", "binary", "regression"]


@pytest.mark.parametrize("task", TASKS)
def test_page_is_well_formed_alone_and_accessible(reports, task: str) -> None:
    source = reports[task].to_html()
    page = Page(source)
    assert page.open == []  # every element was closed in order
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "img", "object", "b"} & set(tags)
    for tag, attributes in page.elements:
        loads = {k: v for k, v in attributes.items() if k in ("src", "srcset", "data", "xlink:href", "href")}
        if tag != "a":
            assert all(v.startswith("#") for v in loads.values()), (tag, loads)
        assert not [k for k in attributes if k.startswith("on")]
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", source)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    pictures = [a for tag, a in page.elements if tag == "svg"]
    assert len(pictures) >= 2
    assert all(a["role"] == "img" and len(a["aria-label"]) > 10 for a in pictures)
    targets = [a["href"][1:] for tag, a in page.elements if a.get("href", "").startswith("#")]
    assert set(targets) <= set(ids)
    assert dict(page.elements)["html"]["lang"] == "en"
    assert len(source.encode()) < 360 * 1024


def test_words_of_the_user_are_shown_as_they_are(reports) -> None:
    page = Page(reports["multiclass"].to_html())
    shown = [w for w in page.words if NASTY in w]
    # title twice, paragraph, headline, two panels, tables, classes, figures, metadata, forest plot, ...
    assert len(shown) > 25
    assert "second paragraph" in page.words
    forest = [w for w in page.words if w.endswith(", better") or w.endswith(", not detectable")]
    assert sum(w.startswith("<b onclick=x>") for w in forest) == 8  # one row per metric and reference


def test_every_number_of_the_headline_is_there(reports) -> None:
    report = reports["multiclass"]
    words = " ".join(Page(report.to_html()).words)
    assert f"{report.metrics['map']['accuracy'].value:.3f}" in words
    assert "better than map" in words
    assert "over-confident" in words
    for name in report.metrics["map"]:
        assert name in words  # defined


def test_figures_have_tables_with_the_same_numbers(reports) -> None:
    source = reports["multiclass"].to_html()
    assert source.count("<summary>The same as tables</summary>") == source.count('<div class="panels">') >= 4
    page = Page(source)
    for b in reports["multiclass"].methods["map"].curves.bins:
        if b.n:
            assert format_number(round(b.accuracy, 4)) in page.words
            assert str(b.n) in page.words


def test_colours_follow_the_page(reports) -> None:
    source = reports["multiclass"].to_html()
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source
    for picture in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        assert "#000000" not in picture
        assert "#ffffff" not in picture
    assert "\\sigma" in source


WRAPPER = """<!DOCTYPE html><body><iframe id="page" src="{name}" style="width:360px;height:700px;border:0"></iframe>
<script>window.onload = () => {{
  const d = document.getElementById("page").contentDocument;
  const wide = [...d.querySelectorAll("main *")].filter(e => !e.closest(".scroll") && !e.closest("svg")
    && e.getBoundingClientRect().right > 360.5).length;
  const box = d.querySelector(".scroll");
  document.body.setAttribute("data-found", [d.documentElement.scrollWidth, d.body.scrollWidth, wide,
    box ? box.scrollWidth > box.clientWidth : "none", d.querySelectorAll("svg").length].join(" "));
}};</script></body>"""


def browse(folder: Path, name: str) -> tuple[list[str], str]:
    (folder / "wrapper.html").write_text(WRAPPER.format(name=name), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=5000",
        "--window-size=800,800",
        "--dump-dom",
    ]
    run = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'wrapper.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return re.search(r'data-found="([^"]*)"', run.stdout)[1].split(), run.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_browser_shows_the_page_on_a_phone_without_sideways_scrolling(reports, tmp_path: Path) -> None:
    for task, report in reports.items():
        report.save(tmp_path, formats=("html",))
        (width, body, wide, table_scrolls, pictures), log = browse(tmp_path, "report.html")
        assert (width, body, wide) == ("360", "360", "0"), task
        assert table_scrolls == "true", task  # the baseline, its scaled row and another method are wider than a phone
        assert int(pictures) >= 2
        assert "CONSOLE" not in log
    (tmp_path / "bad.html").write_text("<main><p style='width:500px'>x</p></main><script>nothing()</script>")
    (width, _, wide, _, _), log = browse(tmp_path, "bad.html")
    assert int(width) > 360  # the measurement sees a page that is too wide, and an error of its script
    assert wide == "1"
    assert "CONSOLE" in log


def photograph(page: Path) -> list[str]:
    """Take a picture of a page, and say which addresses of a network it asked for: the browser's own errands apart."""
    log = page.with_suffix(".net.json")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,2400"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    kept = [
        f"--screenshot={page.with_suffix('.png')}",
        f"--log-net-log={log}",
        f"--user-data-dir={page.parent / 'own'}",
    ]
    subprocess.run([CHROMIUM, *flags, *quiet, *kept, page.as_uri()], capture_output=True, timeout=120, check=True)
    started = re.findall(
        r'"initiator":"([^"]*)"[^{}]*(?:\{[^{}]*\})?[^{}]*"url":"(http[^"]*)"', log.read_text(errors="replace")
    )
    return [url for initiator, url in started if initiator != "not an origin"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_asks_the_network_for_nothing_and_is_kept_as_a_picture(reports, tmp_path: Path) -> None:
    """The pictures stay in pytest's folder of the last runs, for a look at them."""
    for task, report in reports.items():
        report.save(tmp_path / task, formats=("html",))
        page = tmp_path / task / "report.html"
        assert photograph(page) == [], task
        assert page.with_suffix(".png").stat().st_size > 50_000
    curious = tmp_path / "curious.html"
    curious.write_text("<img src='http://127.0.0.1:9/picture.png'>")
    assert photograph(curious) == ["http://127.0.0.1:9/picture.png"]
