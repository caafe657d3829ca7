# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The problems of each step, drawn without replacement from the data, and the share of each replica."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megatron_selfdistill.data.problems import Problem, ProblemSet

T = TypeVar("T")


class ProblemSampler:
    """Endless shuffled epochs of a data set, in global batches.

    Every rank has the same sampler and takes its share of a batch with `shard`, so the order does not depend on the
    data-parallel size.  The order of an epoch depends on the seed and the epoch only.  A batch may have problems of two
    epochs; such a batch, and a batch that is larger than the data set, may have a problem twice.
    """

    def __init__(self, problems: ProblemSet, *, batch_size: int, seed: int) -> None:
        """Start before the first problem; a step takes ``batch_size`` problems over all data-parallel ranks."""
        self._set, self._batch_size, self._seed = problems, batch_size, seed
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order()

    def next_batch(self) -> list[Problem]:
        """Return the next global batch of ``batch_size`` problems, equal on all ranks."""
        return self.take(self._batch_size)

    def take(self, count: int) -> list[Problem]:
        """Return the next ``count`` problems, equal on all ranks."""
        problems: list[Problem] = []
        while len(problems) < count:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            problems.append(self._set.problems[self._order[self._position]])
            self._position += 1
        return problems

    @property
    def epochs(self) -> float:
        """The mean number of visits to a problem so far."""
        return self._epoch + self._position / len(self._order)

    def fork(self) -> ProblemSampler:
        """Return a sampler at the same position; each of the two then moves alone."""
        return copy.copy(self)  # `take` replaces the attributes that it changes

    def coming(self, num_batches: int) -> list[Problem]:
        """Return the different problems of the next batches, in the order in which they first come; do not move."""
        problems = self.fork().take(num_batches * self._batch_size)
        return list({problem.id: problem for problem in problems}.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the position in problems, which does not depend on the batch size, with seed and fingerprint."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "fingerprint": self._set.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of ``state``.

        Raises: ValueError if ``state`` belongs to another data set or seed.
        """
        for name, have in (("fingerprint", self._set.fingerprint), ("seed", self._seed)):
            if state[name] != have:
                raise ValueError(
                    f"The position in the checkpoint belongs to a data set with {name} {state[name]}, "
                    f"but this run's has {name} {have}. "
                    "Resume with the same problems and seed, or start a new run from the weights."
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = list(range(len(self._set)))
        # Python hashes a seed that is a string with SHA-512: equal on every machine and version, unlike hash().
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order


def shard(batch: Sequence[T], dp_rank: int, dp_size: int) -> list[T]:
    """Return the share of a data-parallel rank in a global batch: every ``dp_size``-th problem from ``dp_rank`` on.

    The shares of all ranks are the whole batch; their sizes differ by at most one.
    """
    return list(batch[dp_rank::dp_size])
