"""Which fixed configuration one would choose for all tasks at once: how far each is from the best one, cell by cell."""

import math
from dataclasses import dataclass

from benchmarks.fidelity_posteriors import AUTO, BASELINE
from benchmarks.fidelity_results import Summary

CRITERIA = ("parameter_kl", "total_variation")


@dataclass(frozen=True)
class Rank:
    """A configuration over all cells with B from 64 to N/2.

    Attributes:
        configuration: its name.
        excess: per criterion, the geometric mean over cells of its value over the least of any configuration.
        worst: per criterion, the largest such ratio.
        n_cells: number of cells.
    """

    configuration: str
    excess: dict[str, float]
    worst: dict[str, float]
    n_cells: int

    @property
    def overall(self) -> float:
        """The geometric mean over the criteria."""
        return math.prod(self.excess.values()) ** (1 / len(self.excess))


def ranking(summary: Summary) -> list[Rank]:
    """The configurations that were measured in every cell, the best ones first; "auto" is one of them, unranked best.

    What is compared with is the best fixed configuration of this package in each cell, so that "auto" may be below 1.
    """
    cells = [cell for cell in summary.cells if 64 <= cell.B <= summary.n_data[cell.task] / 2]
    if not cells:
        return []
    # cells in which only some configurations were measured would leave nothing to rank
    most = max(len(summary.cells[cell]) for cell in cells)
    cells = [cell for cell in cells if len(summary.cells[cell]) > most / 2]
    names = set.intersection(*(set(summary.cells[cell]) for cell in cells))
    logs: dict[str, dict[str, list[float]]] = {name: {c: [] for c in CRITERIA} for name in names}
    for cell in cells:
        for criterion in CRITERIA:
            values = {name: summary.mean(cell, name, criterion) for name in summary.cells[cell]}
            fixed = [v for name, v in values.items() if v and name != AUTO and not name.startswith(BASELINE)]
            for name in names:
                if fixed and values[name]:
                    logs[name][criterion].append(math.log(values[name] / min(fixed)))
    found = [
        Rank(
            name,
            {c: math.exp(sum(v) / len(v)) for c, v in of_name.items()},
            {c: math.exp(max(v)) for c, v in of_name.items()},
            len(cells),
        )
        for name, of_name in logs.items()
        if all(len(v) == len(cells) for v in of_name.values())
    ]
    return sorted(found, key=lambda rank: rank.overall)
