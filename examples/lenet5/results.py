"""What is finished: a JSON file for each (stage, variant, seed), beside it the tensors that a later stage needs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from infold.checked_files import replacing
from safetensors.torch import load_file, save_file
from torch import Tensor

Row = dict[str, Any]


class Outcome(NamedTuple):
    """What a job found: rows of a table, a line for the reader, and tensors for later stages."""

    rows: list[Row]
    line: str
    tensors: Mapping[str, Tensor] = {}


class Results:
    """A folder of finished runs. Files appear whole or not at all, so a killed run loses only what was in progress.

    settings: what results depend on. Raises ValueError for a folder with results of other settings.
    """

    def __init__(self, folder: Path, settings: Row) -> None:
        self.folder, self.settings = folder, settings
        self._runs = folder / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists() and (found := json.loads(path.read_text())) != settings:
            raise ValueError(f"out: expected a folder of runs with {settings}, got one with {found}")
        _write(path, settings)

    def path(self, stage: str, variant: str, seed: int, suffix: str) -> Path:
        """Of a run's file, whether it is there or not."""
        return self._runs / f"{stage}.{variant}.{seed}.{suffix}"

    def has(self, stage: str, variant: str, seed: int) -> bool:
        return self.path(stage, variant, seed, "json").exists()

    def put(self, stage: str, variant: str, seed: int, outcome: Outcome) -> None:
        if outcome.tensors:
            with replacing(self.path(stage, variant, seed, "safetensors")) as path:
                save_file({name: tensor.detach().contiguous() for name, tensor in outcome.tensors.items()}, path)
        own = {"stage": stage, "variant": variant, "seed": seed}
        _write(self.path(stage, variant, seed, "json"), [{**own, **row} for row in outcome.rows])

    def rows(self, stage: str, **wanted: Any) -> list[Row]:
        """Those of a stage, of which all ``wanted`` fields are as given, by variant and seed: 16 before 128."""
        paths = sorted(self._runs.glob(f"{stage}.*.json"), key=_natural)
        every = [row for path in paths for row in json.loads(path.read_text())]
        return [row for row in every if all(row.get(field) == value for field, value in wanted.items())]

    def tensors(self, stage: str, variant: str, seed: int) -> dict[str, Tensor]:
        return load_file(self.path(stage, variant, seed, "safetensors"))

    def write_csv(self, stage: str) -> None:
        """All rows of a stage in one table."""
        rows = self.rows(stage)
        with (self.folder / f"{stage}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(field for row in rows for field in row)))
            writer.writeheader()
            writer.writerows(rows)


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _write(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
