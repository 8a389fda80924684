"""What the benchmarks of Newton steps have measured, kept so that an interrupted run goes on where it was."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Key = tuple[Any, ...]


class Records:
    """One JSON line for each thing that was measured; lines of another version count as not there."""

    def __init__(self, path: Path, version: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.version = path, version
        self.found: dict[Key, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that an interruption cut off
            if record["version"] == version:
                self.found[tuple(record["key"])] = record

    def append(self, key: Key, **content: Any) -> None:
        """Keep what was measured."""
        record = {"version": self.version, "key": list(key), **content}
        # a line that was cut off must not swallow this one
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(record) + "\n")
        self.found[tuple(key)] = record


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, str]]) -> None:
    """Write rows of results; a column that a row lacks is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, document: Any) -> None:
    """Write sentences about results."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
