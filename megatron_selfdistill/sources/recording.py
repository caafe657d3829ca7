# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses that one run records and another run trains on: the same tokens in every layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.rollout.base import Response

SampleKey = tuple[int, str, int]
"""(step, problem id, sample index): the name of a sample, and of its random numbers."""


class Recording:
    """A JSONL file with one object per response: step, problem_id, sample_index and the fields of `Response`."""

    def __init__(self, path: str | Path) -> None:
        """Read the whole file.  Raises: ValueError with file and line for a record that is not a response."""
        self.path = Path(path)
        self._responses: dict[SampleKey, Response] = {}
        with self.path.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    key = record.pop("step"), record.pop("problem_id"), record.pop("sample_index")
                    self._responses[key] = Response(**record)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: expected a response as rollout.record writes it, got "
                        f"{line[:60]!r} ({error})"
                    ) from None

    def responses(self, keys: Sequence[SampleKey]) -> list[Response]:
        """Return the responses of these keys, in order.  Raises: ValueError for a key that was not recorded."""
        for key in keys:
            if key not in self._responses:
                step, problem_id, sample = key
                raise ValueError(
                    f"{self.path}: no response of step {step} to problem {problem_id!r}, sample {sample}; it was "
                    "recorded with other data, another seed, or fewer steps"
                )
        return [self._responses[key] for key in keys]


def record(
    path: str | Path,
    keys: Sequence[SampleKey],
    responses: Sequence[Response],
    dp_group: dist.ProcessGroup,
    writes: bool,
) -> None:
    """Append this step's responses of all data-parallel ranks; only the rank with ``writes`` touches the file.

    Collectives: one all-gather of objects over ``dp_group``.
    """
    mine = [
        {"step": step, "problem_id": problem_id, "sample_index": sample, **asdict(response)}
        for (step, problem_id, sample), response in zip(keys, responses, strict=True)
    ]
    entries = gather_items(mine, dp_group)
    if writes:
        with Path(path).open("a") as lines:
            lines.writelines(json.dumps(entry) + "\n" for entry in entries)
