"""Results of single fits in one file, one JSON object a line, and what they come to over draws."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau

VERSION = 1
"""Of the criteria, the tasks and the meaning of the configurations: results of other versions are not read."""

CRITERIA = (
    "parameter_kl",
    "total_variation",
    "predictive_kl",
    "log_variance_error",
    "variance_ratio",
    "log_det_difference",
    "curvature_ratio",
    "least_parameter_kl",
)

Record = dict[str, Any]
_KEY = ("version", "task", "weights", "B", "draw", "configuration", "prior")


def key_of(record: Record) -> tuple[Any, ...]:
    """What distinguishes two results; of two with the same key, the later one counts."""
    return tuple(record[name] for name in _KEY)


@dataclass
class Store:
    """The file of results.

    Attributes:
        path: of the file; it is only ever appended to.
        records: by key.
    """

    path: Path
    records: dict[tuple[Any, ...], Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that an interruption cut off
            if record.get("version") == VERSION:
                self.records[key_of(record)] = record

    def append(self, records: list[Record]) -> None:
        """Keep the results of one fit, all or none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a line that was cut off must not swallow this one
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with self.path.open("a") as file:
            file.write(lines if whole else f"\n{lines}")
        self.records.update({key_of(record): record for record in records})


@dataclass(frozen=True)
class Cell:
    """A task, a number of samples and a prior precision, where configurations compare."""

    task: str
    B: int
    prior: float

    def __str__(self) -> str:
        return f"{self.task}, B = {self.B}, prior {self.prior:g}"


@dataclass(frozen=True)
class Mean:
    """A mean over draws with its standard error (NaN from one draw)."""

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class Summary:
    """Everything over draws.

    Attributes:
        cells: per cell and configuration, the criteria that it has.
        n_data: N of each task.
        kendall: per cell, rank correlation of held-out and true KL over the posteriors of a draw.
        coverage: per task and configuration, by number of magnitude samples: counts of intervals and of hits.
        errors: messages of configurations that failed, with how often.
    """

    cells: dict[Cell, dict[str, dict[str, Mean]]]
    n_data: dict[str, int]
    kendall: dict[Cell, Mean]
    coverage: list[Record]
    errors: dict[str, int]

    def mean(self, cell: Cell, configuration: str, criterion: str) -> float | None:
        """The mean over draws; None where it was not measured."""
        found = self.cells.get(cell, {}).get(configuration, {}).get(criterion)
        return None if found is None else found.mean

    def save(self, folder: Path, name: str = "fidelity", **findings: Any) -> None:
        """Write a CSV file with a row for each cell and configuration, and everything else as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        kinds = ("", "_standard_error", "_draws")
        columns = ["task", "B", "prior", "configuration", *(f"{c}{kind}" for c in CRITERIA for kind in kinds)]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for cell, configurations in self.cells.items():
                for configuration, criteria in configurations.items():
                    row: Record = {**vars(cell), "configuration": configuration}
                    for criterion, value in criteria.items():
                        row |= {f"{criterion}{k}": v for k, v in zip(kinds, _plain(value).values(), strict=True)}
                    writer.writerow(row)
        document = {
            "version": VERSION,
            "n_data": self.n_data,
            **findings,
            "kendall_tau": [{**vars(cell), **_plain(value)} for cell, value in self.kendall.items()],
            "coverage": self.coverage,
            "errors": self.errors,
        }
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path, name: str = "fidelity") -> "Summary":
        """What `save` wrote, to five digits."""
        document = json.loads((folder / f"{name}.json").read_text())
        cells: dict[Cell, dict[str, dict[str, Mean]]] = {}
        with (folder / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                cell = Cell(row["task"], int(row["B"]), float(row["prior"]))
                cells.setdefault(cell, {})[row["configuration"]] = {
                    c: Mean(float(row[c]), float(row[f"{c}_standard_error"] or "nan"), int(row[f"{c}_draws"]))
                    for c in CRITERIA
                    if row[c]
                }
        kendall = {
            Cell(t["task"], t["B"], t["prior"]): Mean(
                t["mean"], math.nan if t["standard_error"] is None else t["standard_error"], t["n_draws"]
            )
            for t in document["kendall_tau"]
        }
        return cls(cells, document["n_data"], kendall, document["coverage"], document["errors"])


def summarize(records: Iterable[Record]) -> Summary:
    """Means over draws of every cell and configuration."""
    records = list(records)
    values: dict[Any, list[float]] = defaultdict(list)
    pairs: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    errors: dict[str, int] = defaultdict(int)
    for r in records:
        cell = Cell(r["task"], r["B"], r["prior"])
        if "error" in r:
            errors[f"{r['task']}, B = {r['B']}, {r['configuration']}: {r['error']}"] += 1
            continue
        for criterion in CRITERIA:
            if r.get(criterion) is not None:
                values[cell, r["configuration"], criterion].append(r[criterion])
        if r.get("held_out_kl") is not None and r.get("parameter_kl") is not None:
            pairs[cell, r["draw"]].append((r["held_out_kl"], r["parameter_kl"]))
    cells: dict[Cell, dict[str, dict[str, Mean]]] = {}
    for (cell, name, criterion), found in sorted(values.items(), key=lambda item: _order(item[0])):
        cells.setdefault(cell, {}).setdefault(name, {})[criterion] = mean_of(found)
    taus: dict[Cell, list[float]] = defaultdict(list)
    for (cell, _), found_pairs in pairs.items():
        if len(found_pairs) > 2:
            taus[cell].append(float(kendalltau(*zip(*found_pairs, strict=True)).statistic))
    kendall = {cell: mean_of(taus[cell]) for cell in sorted(taus, key=lambda c: (c.task, c.B, c.prior))}
    n_data = {r["task"]: r["n_data"] for r in records}
    return Summary(cells, n_data, kendall, coverage_of(records), dict(errors))


def coverage_of(records: Iterable[Record]) -> list[Record]:
    """Shares of 95 % intervals that contain the full batch's curvature, by number of magnitude samples.

    Results from before there were the package's own intervals have no say in their share.
    """
    counts: dict[Any, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    fits = {key_of(r)[:-1]: r for r in records if r.get("coverage")}  # the prior does not matter
    for r in fits.values():
        for name, count in r["coverage"].items():
            counts[r["task"], r["configuration"], r["n_magnitude_samples"]][name] += count
        if "interval" in r["coverage"]:
            counts[r["task"], r["configuration"], r["n_magnitude_samples"]]["judged"] += r["coverage"]["n"]
    return [
        {
            "task": task,
            "configuration": configuration,
            "n_magnitude_samples": n,
            "intervals": c["n"],
            "interval": c["interval"] / c["judged"] if c["judged"] else None,
            "plain": c["plain"] / c["n"],
            "log": c["log"] / c["n"],
        }
        for (task, configuration, n), c in sorted(counts.items())
    ]


def mean_of(values: list[float]) -> Mean:
    """Mean and standard error of the mean."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return Mean(mean, math.sqrt(variance / n), n)


def _order(key: tuple[Cell, str, str]) -> tuple[Any, ...]:
    cell, configuration, _ = key
    return cell.task, cell.B, cell.prior, configuration


def _plain(value: Mean) -> dict[str, Any]:
    mean, error = (float(f"{x:.5g}") for x in (value.mean, value.standard_error))
    return {"mean": mean, "standard_error": None if math.isnan(error) else error, "n_draws": value.n}
