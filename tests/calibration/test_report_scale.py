"""Memory of a large report: linear in the data, and less than twice their size."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import report_scale


@pytest.mark.slow
def test_memory_of_a_report_stays_below_twice_the_data() -> None:
    small, large = (report_scale.measure_apart(n, 500, threads=1) for n in (5_000, 50_000))

    def growth(measured: dict[str, float]) -> float:
        return measured["peak, GiB"] - measured["peak before the report, GiB"]

    data = large["data, GiB"] - small["data, GiB"]
    assert data > 0.15  # what is measured is larger than what an allocator keeps
    assert growth(large) - growth(small) < 2 * data
