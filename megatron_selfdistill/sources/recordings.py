# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The responses of a run in a file, so that another run trains on the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.metrics.run_log import json_object
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout


class Recording:
    """A JSONL file with one object per response: step, problem_id, sample_index and the fields of `Response`.

    A run with an environment adds the fields turn, where it is not 0, and reply with the fields of `Reply`; a first
    response of a session has the field opening, too.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the whole file."""
        self.path = Path(path)
        self._responses: dict[SampleKey, Response] = {}
        self._replies: dict[SampleKey, Reply] = {}
        self._openings: dict[SampleKey, Reply] = {}
        with self.path.open("rb") as lines:
            for line in lines:
                record = json_object(line)
                turn, reply, opening = (record.pop(*field) for field in _OF_EPISODES)
                key = SampleKey(record.pop("step"), record.pop("problem_id"), record.pop("sample_index"), turn)
                self._responses[key] = Response(**record)
                if reply is not None:
                    self._replies[key] = Reply(**reply)
                if opening is not None:
                    self._openings[key] = Reply(**opening)

    def responses(self, keys: Sequence[SampleKey]) -> list[Response]:
        """Return the responses of these keys, in order.  Raises: KeyError for a key that was not recorded."""
        return [self._responses[key] for key in keys]

    def replies(self, keys: Sequence[SampleKey]) -> list[Reply]:
        """Return the replies to the responses of these keys, in order.  Raises: KeyError for one without a reply."""
        return [self._replies[key] for key in keys]

    def openings(self, keys: Sequence[SampleKey]) -> list[Reply | None]:
        """Return the replies before the responses of these keys, in order; None for an episode without a session."""
        return [self._openings.get(key) for key in keys]


_OF_EPISODES = (("turn", 0), ("reply", None), ("opening", None))
"""The fields of a recorded response that not every response has, with the values of the others."""


def record(
    path: str | Path,
    rollouts: Sequence[Rollout],
    dp_group: dist.ProcessGroup,
    writes: bool,
) -> None:
    """Append this step's responses of all data-parallel ranks; only the rank with ``writes`` touches the file.

    Collectives: one all-gather of objects over ``dp_group``.
    """
    mine = []
    for one in rollouts:
        key, reply = one.key, one.reply
        assert key is not None, "a sampled response has a name"
        entry: dict[str, Any] = {"step": key.step, "problem_id": key.problem_id, "sample_index": key.sample_index}
        if key.turn:
            entry["turn"] = key.turn
        if reply is not None:
            entry["reply"] = _recorded(reply)
        if one.opening is not None:
            entry["opening"] = _recorded(one.opening)
        mine.append(entry | asdict(one.response))
    entries = gather_items(mine, dp_group)
    if writes:
        with Path(path).open("a") as lines:
            lines.writelines(json.dumps(entry) + "\n" for entry in entries)


def _recorded(reply: Reply) -> dict[str, Any]:
    """Return the fields of a reply, without a failure where there is none."""
    return {name: value for name, value in asdict(reply).items() if name != "failure" or value is not None}
