"""Finished reports: rendering, saving, reading back and checking."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from debiased_laplace.calibration.check import DEFAULT, CheckResult, ThresholdSource, check_report, read_thresholds
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.document import from_json, to_json
from debiased_laplace.calibration.tables import Table, to_csv, to_frame, to_markdown, to_text
from debiased_laplace.checks import shown
from debiased_laplace.files import replacing

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["html", "json", "md", "csv"]


class CalibrationReport(ReportContents):
    """Calibration of several methods on one test set, with confidence intervals and verdicts.

    `metrics[method][name]` is an `Estimate`, `comparisons` holds the paired differences to the baseline, `warnings` the
    limits of the numbers.
    """

    def __str__(self) -> str:
        return to_text(self)

    def __repr__(self) -> str:
        return f"CalibrationReport({self.task}, n={self.data.n}, methods: {', '.join(self.methods)})"

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "CalibrationReport":
        """Read a stored report; it renders to the same bytes, without the predictions.

        Args:
            source: text that `to_json` returned, or the path of a file with it.

        Raises:
            ValueError: if the text is not JSON, not a report, or of another version; the message says where.
            OSError: if there is no such file.
        """
        return from_json(cls, source)

    def to_json(self) -> str:
        """Return the report as JSON text: every number, its interval or the reason why it has none."""
        return to_json(self)

    def to_html(self) -> str:
        """Return the report as one page without scripts or external files."""
        from debiased_laplace.calibration.html.page import render_html  # imports matplotlib, which only a page needs

        return render_html(self)

    def to_markdown(self) -> str:
        """Return findings, gates, metrics and comparisons as Markdown for a pull request."""
        return to_markdown(self)

    def to_frame(self, table: Table = "metrics") -> "DataFrame":
        """Return one number with its interval per row.

        Args:
            table: "metrics" (per method and metric), "comparisons" (per paired difference), or "ood" (per set out of
                distribution, method, score and metric).
        """
        return to_frame(self, table)

    def to_csv(self, table: Table = "metrics") -> str:
        """Return `to_frame(table)` as CSV text; text that a spreadsheet would read as a formula begins with a quote."""
        return to_csv(self, table)

    def check(self, thresholds: ThresholdSource = DEFAULT) -> CheckResult:
        """Compare metrics with thresholds, by their confidence bounds unless a threshold says otherwise.

        Args:
            thresholds: path of a TOML file, or the mapping that it would hold: `{"threshold": [{"metric": "nll",
                "method": "laplace", "max": 0.35}]}`; or "default": no method may have a larger negative log-likelihood
                than the baseline, nor lose more than half a point of accuracy.

        Raises:
            ValueError: for unknown keys, metrics or methods; the message lists the known ones.
            OSError: if there is no such file.
        """
        return check_report(self, read_thresholds(thresholds, self.task))

    def save(
        self, folder: str | os.PathLike[str], *, formats: Sequence[Format] = ("html", "json", "md")
    ) -> tuple[Path, ...]:
        """Write the report into a folder, which is created if it is missing, and return the paths of the files.

        Args:
            folder: files of the same names in it are replaced, all of them or, if one cannot be written, none.
            formats: any of "html", "json", "md" and "csv": report.html, report.json, ...; "csv" also writes
                report_comparisons.csv and, with sets out of distribution, report_ood.csv.
        """
        chosen = tuple(formats) if isinstance(formats, Iterable) and not isinstance(formats, str) else ()
        if not chosen or any(not isinstance(f, str) or f not in get_args(Format) for f in chosen):
            known = ", ".join(map(repr, get_args(Format)))
            raise ValueError(f"formats must be a sequence out of {known}; got {shown(formats)}.")
        if not isinstance(folder, str | os.PathLike):
            raise ValueError(f"folder must be a path; got {shown(folder)}.")
        render = {"html": self.to_html, "json": self.to_json, "md": self.to_markdown, "csv": self.to_csv}
        texts = {f"report.{name}": render[name]() for name in chosen}  # all of them before a present file is replaced
        if "csv" in chosen:
            texts["report_comparisons.csv"] = self.to_csv("comparisons")
            if self.ood:
                texts["report_ood.csv"] = self.to_csv("ood")
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = tuple(Path(folder) / name for name in texts)
        with replacing(*paths) as parts:
            for part, text in zip(parts, texts.values(), strict=True):
                part.write_bytes(text.encode())
        return paths
