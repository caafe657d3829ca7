# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Problems of a path, with the configuration's defaults for all that a test does not state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.config import DataConfig
from megatron_selfdistill.data import problems
from megatron_selfdistill.data.problems import ProblemSet
from megatron_selfdistill.data.records import RecordSource


def record_source(path: str | Path | Sequence[str | Path], **changes: Any) -> RecordSource:
    data = DataConfig()
    defaults = RecordSource(path, data.split, data.subset, data.fields, data.on_bad_record, data.limit, section="data")
    return RecordSource(**vars(defaults) | changes)


def load_problems(path: Any, *, require_solution: bool = True, **changes: Any) -> ProblemSet:
    return problems.load_problems(record_source(path, **changes), require_solution=require_solution)


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a data set would be written; datasets is imported here, since its import takes half a second."""
    import datasets

    datasets.Dataset.from_list([dict(row) for row in rows]).to_parquet(file)
