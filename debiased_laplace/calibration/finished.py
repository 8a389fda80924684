"""A finished report: rendered, saved, read back and checked."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.documents.loading import load_report
from debiased_laplace.calibration.gates.checking import CheckResult
from debiased_laplace.calibration.gates.judging import judge_report
from debiased_laplace.calibration.gates.thresholds import DEFAULT, ThresholdSource, read_thresholds
from debiased_laplace.calibration.rendering.csv_tables import CsvTable, render_csv
from debiased_laplace.calibration.rendering.html import render_html
from debiased_laplace.calibration.rendering.json_document import render_json
from debiased_laplace.calibration.rendering.markdown import render_markdown, render_text

Format = Literal["html", "json", "md", "csv"]


class CalibrationReport(ReportContents):
    """Calibration of several methods on one test set, with error bars and verdicts.

    `metrics[method][name]` is an `Estimate`; `comparisons` holds the paired differences to the
    baseline, `warnings` what a reader must know before trusting a number.
    """

    def __str__(self) -> str:
        return render_text(self)

    def __repr__(self) -> str:
        methods = ", ".join(self.methods)
        return f"CalibrationReport({self.task}, n={self.data.n}, methods: {methods})"

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "CalibrationReport":
        """The report that a JSON text or file holds; it renders to the same bytes, without the predictions.

        Args:
            source: what `to_json` gave, or the path of a file with it.

        Raises:
            ValueError: if it is no JSON, no report, or of a newer version; the message says where.
            OSError: if there is no such file.
        """
        return load_report(cls, source)

    def to_json(self) -> str:
        """The report as JSON text: every number, its interval or the reason why it has none."""
        return render_json(self)

    def to_html(self) -> str:
        """The report as one page without scripts or external files."""
        return render_html(self)

    def to_markdown(self) -> str:
        """Verdict, gates, metrics and comparisons in Markdown that a pull request can show."""
        return render_markdown(self)

    def to_csv(self, table: CsvTable = "metrics") -> str:
        """A table of the report as CSV text, one number with its interval a row.

        Args:
            table: "metrics": a row per method and metric; "comparisons": a row per paired difference; "ood": a row per
                set out of distribution, method, score and metric.

        Raises:
            ValueError: for another table.
        """
        return render_csv(self, table)

    def check(self, thresholds: ThresholdSource = DEFAULT) -> CheckResult:
        """Judge the report by thresholds, on the confidence bound unless they say otherwise.

        Args:
            thresholds: path of a TOML file, or the mapping it would hold: `{"threshold": [{"metric": "nll", "method":
                "laplace", "max": 0.35}]}`; or "default": no method may have a larger negative log-likelihood than the
                baseline, nor lose more than half a point of accuracy.

        Raises:
            ValueError: for unknown keys, metrics or methods; the message names those that there are.
            OSError: if there is no such file.
        """
        return CheckResult(judge_report(self, read_thresholds(thresholds, self.task)))

    def save(
        self, folder: str | os.PathLike[str], *, formats: Sequence[Format] = ("html", "json", "md")
    ) -> tuple[Path, ...]:
        """Write report.html, report.json, report.md and the tables in CSV into a folder, which is made if missing.

        Args:
            folder: where to write; present files of these names are replaced.
            formats: which of "html", "json", "md" and "csv". The last is report.csv, report_comparisons.csv and, with
                sets out of distribution, report_ood.csv.

        Returns:
            The paths, in the order of `formats`.

        Raises:
            ValueError: for no format or an unknown one.
        """
        chosen = () if isinstance(formats, str) else tuple(formats)
        if not chosen or any(f not in get_args(Format) for f in chosen):
            known = ", ".join(map(repr, get_args(Format)))
            raise ValueError(f"formats must be a sequence out of {known}; got {formats!r}.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = []
        for name in chosen:
            for stem, render in self._writers(name).items():
                path = Path(folder) / f"{stem}.{name}"
                path.write_text(render(), encoding="utf-8", newline="\n")
                paths.append(path)
        return tuple(paths)

    def _writers(self, name: Format) -> Mapping[str, Callable[[], str]]:
        """Stem of a file to what writes it."""
        if name == "csv":
            writers = {"report": self.to_csv, "report_comparisons": lambda: self.to_csv("comparisons")}
            return writers | ({"report_ood": lambda: self.to_csv("ood")} if self.ood else {})
        return {"report": {"html": self.to_html, "json": self.to_json, "md": self.to_markdown}[name]}
