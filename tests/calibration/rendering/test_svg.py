import re

import pytest

from debiased_laplace.calibration import ReportFigure
from debiased_laplace.calibration.rendering.svg import adopt_svg, draw_svg


def svg(inside: str = "", attributes: str = 'viewBox="0 0 10 10"') -> str:
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {spaces} {attributes}>{inside}</svg>"


@pytest.fixture
def figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="black", marker="o", label="a")
    axes.fill_between([0, 1], [0, 1], hatch="//")
    axes.set_title("words")
    return figure


def test_drawing_twice_gives_the_same_bytes_without_a_date(figure) -> None:
    one, two = draw_svg(figure), draw_svg(figure)
    assert one == two
    assert "<dc:date>" not in one
    assert ">words</text>" in one


def test_ids_are_prefixed_together_with_what_refers_to_them(figure) -> None:
    adopted = adopt_svg(draw_svg(figure), name="mine", alt="a line")
    ids = re.findall(r'\bid="([^"]*)"', adopted)
    assert len(ids) == len(set(ids)) > 4
    assert all(i.startswith("mine") for i in ids)
    targets = re.findall(r'href="#([^"]*)"', adopted) + re.findall(r"url\(#([^)]*)\)", adopted)
    assert len(targets) > 5
    assert {*targets, "mine"} == set(ids)  # and ids that nothing refers to are gone


def test_black_takes_the_colour_of_the_text(figure) -> None:
    assert "#000000" in draw_svg(figure)
    adopted = adopt_svg(draw_svg(figure), name="mine", alt="a line")
    assert "#000000" not in adopted
    assert "currentColor" in adopted
    assert "#000080" in adopt_svg(svg('<path stroke="#000080" fill="black"/>'), name="a", alt="b")


def test_text_alternative_and_size(figure) -> None:
    adopted = adopt_svg(draw_svg(figure), name="mine", alt='a "line" & <more>')
    root = adopted[: adopted.index(">")]
    assert 'role="img"' in root
    assert 'aria-label="a &quot;line&quot; &amp; &lt;more&gt;"' in adopted
    assert "max-width: 288px" in root  # three inches
    assert "<style" not in adopted
    assert "xmlns" not in adopted


def test_width_and_height_stand_in_for_a_view_box() -> None:
    assert 'viewBox="0 0 30 20"' in adopt_svg(svg("", 'width="30" height="20"'), name="a", alt="b")


def test_texts_are_replaced_and_escaped() -> None:
    adopted = adopt_svg(svg("<text>row 0</text><text>row 1</text>"), name="a", alt="b", texts={"row 0": "<$x$>"})
    assert "<text>&lt;$x$&gt;</text>" in adopted
    assert "<text>row 1</text>" in adopted


WRONG = {
    "no XML": ("<svg", "well-formed"),
    "another element": ("<div></div>", "<svg> element"),
    "no size": (svg("", ""), "viewBox"),
    "a script": (svg("<script>1</script>"), "<script>"),
    "HTML inside": (svg("<foreignObject/>"), "<foreignObject>"),
    "an event": (svg('<path onclick="1"/>'), "onclick"),
    "a script address": (svg('<path style="x: javascript:1"/>'), "scripts"),
    "a remote image": (svg('<image href="https://example.org/a.png"/>'), "other files"),
    "a remote image by xlink": (svg('<image xlink:href="//example.org/a.png"/>'), "other files"),
    "a remote fill": (svg('<path fill="url(https://example.org/a.svg#b)"/>'), "other files"),
    "a style sheet": (svg("<style>body{display:none}</style>"), "style sheet"),
    "an entity": ('<!DOCTYPE svg [<!ENTITY a "b">]>' + svg(), "entities"),
}


@pytest.mark.parametrize("case", WRONG)
def test_figures_that_do_not_belong_in_a_page(case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ReportFigure("title", text, alt="words")


def test_a_figure_needs_words(figure) -> None:
    with pytest.raises(ValueError, match="text alternative"):
        ReportFigure("title", svg(), alt=" ")
    assert ReportFigure.from_matplotlib("title", figure, alt="a line", note="n").note == "n"
