"""A finished report: rendered, saved, read back and checked."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from debiased_laplace.calibration.check import DEFAULT, CheckResult, ThresholdSource, check_report, read_thresholds
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.document import from_json, to_json
from debiased_laplace.calibration.tables import Table, to_frame, to_markdown, to_text

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["html", "json", "md", "csv"]


class CalibrationReport(ReportContents):
    """Calibration of several methods on one test set, with error bars and verdicts.

    `metrics[method][name]` is an `Estimate`; `comparisons` holds the paired differences to the baseline, `warnings`
    what a reader must know before trusting a number.
    """

    def __str__(self) -> str:
        return to_text(self)

    def __repr__(self) -> str:
        return f"CalibrationReport({self.task}, n={self.data.n}, methods: {', '.join(self.methods)})"

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "CalibrationReport":
        """Read a stored report; it renders to the same bytes, without the predictions.

        Args:
            source: what `to_json` returned, or the path of a file with it.

        Raises:
            ValueError: if it is no JSON, no report, or of another version; the message says where.
            OSError: if there is no such file.
        """
        return from_json(cls, source)

    def to_json(self) -> str:
        """Return the report as JSON text: every number, its interval or the reason why it has none."""
        return to_json(self)

    def to_html(self) -> str:
        """Return the report as one page without scripts or external files."""
        from debiased_laplace.calibration.html.page import render_html  # matplotlib, which only a page costs

        return render_html(self)

    def to_markdown(self) -> str:
        """Return findings, gates, metrics and comparisons in Markdown that a pull request can show."""
        return to_markdown(self)

    def to_frame(self, table: Table = "metrics") -> "DataFrame":
        """Return one number with its interval a row.

        Args:
            table: "metrics": a row per method and metric; "comparisons": a row per paired difference; "ood": a row per
                set out of distribution, method, score and metric.

        Raises:
            ValueError: for another table.
        """
        return to_frame(self, table)

    def to_csv(self, table: Table = "metrics") -> str:
        """Return `to_frame(table)` as CSV text."""
        return str(self.to_frame(table).to_csv(index=False, lineterminator="\n"))

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
        return check_report(self, read_thresholds(thresholds, self.task))

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
        write = {"html": self.to_html, "json": self.to_json, "md": self.to_markdown, "csv": self.to_csv}
        files: dict[str, Callable[[], str]] = {f"report.{name}": write[name] for name in chosen}
        if "csv" in chosen:
            files["report_comparisons.csv"] = lambda: self.to_csv("comparisons")
            if self.ood:
                files["report_ood.csv"] = lambda: self.to_csv("ood")
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = []
        for name, render in files.items():
            paths.append(Path(folder) / name)
            paths[-1].write_bytes(render().encode())  # rendered before a present file is opened
        return tuple(paths)
