"""Steps of the site's build: a page for each example, and formulas as MathML, which browsers draw without a script.

With GALLERY=run in the environment the examples are executed, which takes half an hour on two cores: their pages show
what they print, and pictures of this run. Without it, pictures are those in docs/figures.
"""

import html
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parent.parent / "examples"
WHY, FIDELITY = "why_biased.md", "fidelity.md#two-smaller-comparisons"


class Example(NamedTuple):
    """How the gallery shows an example: title, page that discusses its numbers, picture."""

    title: str
    page: str
    picture: str | None = None


SHOWN = {
    "01": Example("The same batch against a split", FIDELITY, "inflated_curvature.svg"),
    "02": Example("Kronecker bases", FIDELITY),
    "03": Example("A regression report", "report_metrics.md#regression", "regression_report.png"),
    "04": Example("Training by debiased Newton steps", "newton_steps.md#an-optimizer"),
    "05": Example("Regression to the mean", WHY, "regression_to_the_mean.png"),
    "06": Example("How biased is a batch?", "diagnose.md#an-example", "how_biased.png"),
    "07": Example("The quadratic in a plane", f"{WHY}#the-same-on-a-network", "quadratic_in_a_plane.png"),
    "08": Example("Curvature over eigenvectors", f"{WHY}#the-same-on-a-network", "curvature_over_eigenvectors.png"),
    "09": Example("Conjugate gradients", f"{WHY}#what-it-does-to-conjugate-gradients", "conjugate_gradients.png"),
    "10": Example(
        "Laplace against the full batch",
        f"{WHY}#what-it-does-to-a-laplace-posterior",
        "laplace_against_the_full_batch.png",
    ),
    "11": Example("A likelihood of one's own", "likelihoods.md#your-own"),
    "12": Example("Segmentation", "likelihoods.md#positions-sequences-and-images"),
    "13": Example("Fine-tuning with predicted noise", "likelihoods.md#reports"),
    "14": Example("Counts", "likelihoods.md#reports"),
    "15": Example("Reviews by a transformer with LoRA", "likelihoods.md#reports"),
    "16": Example("Token classification", "likelihoods.md#positions-sequences-and-images"),
    "17": Example("A language model", "likelihoods.md#positions-sequences-and-images"),
}
DOUBLE_STRUCK = {"E": "𝔼", "N": "ℕ", "P": "ℙ", "R": "ℝ"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def examples() -> list[Path]:
    """The numbered examples, in their order."""
    return sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))


def shown(path: Path) -> Example:
    """How the gallery shows an example; a KeyError asks for the entry of a new one."""
    return SHOWN[path.stem[:2]]


def cells_of(path: Path) -> list[tuple[bool, str]]:
    """The cells of an example: whether it is text, and its content."""
    cells = []
    for cell in re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        is_text = "[markdown]" in head
        content = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body
        cells.append((is_text, content.strip("\n")))
    return cells


@cache
def executed(path: Path) -> tuple[str, bytes | None]:
    """What an example prints, and its picture; nothing unless the gallery is to be run."""
    if os.environ.get("GALLERY") != "run":
        return "", None
    picture = shown(path).picture
    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder) / (picture or "none")
        draws = picture is not None and "--figure" in path.read_text()
        options = ["--figure", str(figure)] if draws else []
        done = subprocess.run([sys.executable, path, *options], capture_output=True, text=True, check=True)
        return done.stdout, figure.read_bytes() if draws else None


def page_of(path: Path) -> str:
    """The page of an example: its question and claim, its picture, its code, and what it prints."""
    title, page, picture = shown(path)
    parts = [f"# {title}"]
    for position, (is_text, content) in enumerate(cells_of(path)):
        parts.append(content if is_text else f"```python\n{content}\n```")
        if position == 0:
            parts += [f"![{title}](../figures/{picture})"] if picture else []
            parts.append(f"The numbers in their context: [{page.partition('.')[0].replace('_', ' ')}](../{page}).")
    printed, _ = executed(path)
    parts += [f"It prints:\n\n```text\n{printed.strip()}\n```"] if printed else []
    return "\n\n".join(parts) + "\n"


def overview() -> str:
    """The first page of the gallery."""
    parts = [
        "# Gallery",
        "Every example prints the numbers that it claims, on one page of code; `--figure FILE` draws its picture. "
        "The tests run all of them.",
    ]
    for path in examples():
        title, _, picture = shown(path)
        question = cells_of(path)[0][1].split("\n\n")[0].replace("\n", " ")
        parts.append(f"## [{title}]({path.stem}.md)\n\n{question}")
        parts += [f"[![{title}](../figures/{picture})]({path.stem}.md){{ .gallery }}"] if picture else []
    return "\n\n".join(parts) + "\n"


def on_config(config: Any) -> Any:
    """Put the pages of the examples into the navigation."""
    for section in config.nav:
        if "Gallery" in section:
            section["Gallery"] = ["gallery/index.md", *({shown(p).title: f"gallery/{p.stem}.md"} for p in examples())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the examples."""
    files.append(File.generated(config, "gallery/index.md", content=overview()))
    for path in examples():
        files.append(File.generated(config, f"gallery/{path.stem}.md", content=page_of(path)))
        _, picture = executed(path)
        if picture is not None:
            name = f"figures/{shown(path).picture}"
            files.remove(files.src_uris[name])
            files.append(File.generated(config, name, content=picture))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Replace LaTeX by MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    text = html.unescape(match[2]).strip()
    formula = convert(text[2:-2].strip(), display="block" if text.startswith("\\[") else "inline")
    # browsers know no variants of letters, but the letters themselves
    return re.sub(r'<mi mathvariant="double-struck">(\w)</mi>', lambda m: f"<mi>{DOUBLE_STRUCK[m[1]]}</mi>", formula)
