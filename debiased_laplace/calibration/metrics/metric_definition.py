"""The form in which metrics are explained."""

from dataclasses import dataclass
from typing import Literal

Section = Literal["headline", "detail", "selective", "detection"]
Better = Literal["lower", "higher", "zero", "one", "level", "none"]


@dataclass(frozen=True)
class MetricDefinition:
    """A metric in words.

    Attributes:
        label: short name for table rows.
        better: the good direction; "zero", "one" and "level" are targets, "none" is no judgement.
        meaning: one or two sentences.
        reference: authors (year) and where to find it; empty for textbook quantities.
        section: "headline" for the table that everybody reads, "detail" for the folded one under it, "selective" and
            "detection" for the sections of their own.
        unit: of regression metrics: "target" is the unit of the targets, "squared" its square.
    """

    label: str
    better: Better
    meaning: str
    reference: str = ""
    section: Section = "headline"
    unit: Literal["", "target", "squared"] = ""


DIRECTIONS: dict[Better, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "0 is right",
    "one": "1 is right",
    "level": "the nominal level is right",
    "none": "",
}
