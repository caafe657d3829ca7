# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The responses of a run in a file, so that another run trains on the same tokens.

    train(ranks, [*arguments, f"tests.record={path}"])
    train(ranks, [*others, f"tests.replay={path}"], 2)

The file has one JSON object per response: step, problem_id, sample_index, the turn where it is not 0, the fields of
`Response`, and with an environment reply and opening with the fields of `Reply`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from megatron_selfdistill.rollout.base import Response
    from megatron_selfdistill.rollout.sampling import SampleKey

RECORD, REPLAY = "tests.record=", "tests.replay="


def taken_out(arguments: Sequence[str], patch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of the command line, and let runs record and replay responses as the others say."""
    for argument in arguments:
        if argument.startswith(RECORD):
            _record(Path(argument.removeprefix(RECORD)), patch)
        elif argument.startswith(REPLAY):
            _replay(Path(argument.removeprefix(REPLAY)), patch)
    return [argument for argument in arguments if not argument.startswith((RECORD, REPLAY))]


def _record(path: Path, patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.distributed.collectives import gather_items
    from megatron_selfdistill.sources.on_policy import OnPolicy

    rewarded = OnPolicy._rewarded

    def record(self: Any, method: Any, rollouts: Any) -> Any:
        grid = self._options.grid
        entries = gather_items([_entry(rollout) for rollout in rollouts], grid.dp_group)
        if grid.is_reporter:
            with path.open("a") as lines:
                lines.writelines(json.dumps(entry) + "\n" for entry in entries)
        return rewarded(self, method, rollouts)

    patch.setattr(OnPolicy, "_rewarded", record)


def _entry(rollout: Any) -> dict[str, Any]:
    key = rollout.key
    entry: dict[str, Any] = {"step": key.step, "problem_id": key.problem_id, "sample_index": key.sample_index}
    if key.turn:
        entry["turn"] = key.turn
    for name in ("reply", "opening"):
        if (said := getattr(rollout, name)) is not None:
            fields = asdict(said)
            entry[name] = {key: value for key, value in fields.items() if key != "failure" or value is not None}
    return entry | asdict(rollout.response)


def _replay(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Let each step take its responses from ``path`` instead of sampling; an environment replies to them again."""
    from megatron_selfdistill.rollout.base import Response
    from megatron_selfdistill.rollout.sampling import SampleKey
    from megatron_selfdistill.sources.on_policy import OnPolicy

    known: dict[SampleKey, Response] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        turn, _, _ = record.pop("turn", 0), record.pop("reply", None), record.pop("opening", None)
        key = SampleKey(record.pop("step"), record.pop("problem_id"), record.pop("sample_index"), turn)
        known[key] = Response(**record)

    def replay(self: Any, step: int, keys: Sequence[SampleKey], *others: Any) -> list[Response]:
        return [known[key] for key in keys]

    patch.setattr(OnPolicy, "_responses", replay)
