"""A finished diagnosis: its findings, and the ways to show them."""

from os import PathLike

from debiased_laplace.calibration import ReportFigure, ReportTable
from debiased_laplace.diagnosis.findings import Findings
from debiased_laplace.diagnosis.presentation import as_text, draw, picture, summarize, tabulate


class Diagnosis(Findings):
    """How biased the quadratics of mini-batches are for one model; `print` shows it."""

    def summary(self) -> str:
        """The findings in sentences."""
        return summarize(self)

    def table(self) -> ReportTable:
        """The findings as a table, for `calibration_report(tables=...)`."""
        return tabulate(self)

    def figure(self) -> ReportFigure:
        """The findings as a picture, for `calibration_report(figures=...)`."""
        return draw(self)

    def save_figure(self, path: str | PathLike[str]) -> None:
        """Write the picture to a file, in the format of its ending."""
        picture(self).savefig(path, dpi=130)

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        sizes = ", ".join(str(b.batch_size) for b in self.batches)
        return f"Diagnosis({self.n_parameters} parameters, batches of {sizes}, {self.n_draws} draws)"
