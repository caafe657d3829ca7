# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The samples of a step: some of its responses, with the numbers of the loss for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.metrics.samples import Sample, chosen, sample_of
from megatron_selfdistill.metrics.token_numbers import token_numbers

if TYPE_CHECKING:
    from megatron_selfdistill.data.tokenizer import Tokenizer
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.pipeline.step_output import StepOutput


def step_samples(
    output: StepOutput,
    contexts: Sequence[ContextPair],
    solutions: Sequence[str],
    count: int,
    tokenizer: Tokenizer,
    grid: RankGrid,
) -> Callable[[], Sequence[Sample]] | None:
    """Return a function that makes samples of the first ``count`` problems; None except on the first replica.

    The result is also None if there is nothing to show.  ``solutions``: for each of ``contexts``, the solution in the
    teacher's prompt.
    Collectives: as in `token_numbers`, on the ranks of the first replica.
    """
    shown = chosen(contexts, count) if grid.dp_rank == 0 and solutions else []
    if not shown:
        return None
    numbers = token_numbers(output, [span for _, span in shown], grid)
    solution_of = {id(context): solution for context, solution in zip(contexts, solutions, strict=True)}
    return lambda: [
        sample_of(context, solution_of[id(context)], known, tokenizer)
        for (context, _), known in zip(shown, numbers, strict=True)
    ]
