# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses for the target explorer: per token the target's numbers and a summary of the logits of all models."""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_selfdistill.config.due import evaluation_due
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.tokenizer import pieces
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.instruments.explorer.logit_summary import LogitSummary, summarise_logits
from megatron_selfdistill.instruments.explorer.target_page import forget_explored_after, write_explored
from megatron_selfdistill.learner import Learner
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Divergence, Status, Target
from megatron_selfdistill.metrics.run_log import finite
from megatron_selfdistill.metrics.samples import chosen, gathered_rows
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.trainer import Trainer

if TYPE_CHECKING:
    from megatron_selfdistill.data.tokenizer import Tokenizer

LONGEST = 8192
"""The largest number of tokens of a response that is explored; later tokens are left out."""
BLOCK_TOKENS = 64
"""The number of tokens whose summaries the page decodes at a time."""

_STATS = (
    "loss reverse_kl student_entropy teacher_entropy target_entropy wanted_entropy beta status "
    "student_log_prob teacher_log_prob target_log_prob"
).split()
_MEASURES = ("mass_on_rare_student", "reference_entropy")
_OF_CONTROLS = ("general_kl", "specific_kl")  # KL(c || a) and KL(t || c)


@dataclass(frozen=True)
class TokenTarget:
    """The target and the divergence of the tokens of a response."""

    target: Target
    divergence: Divergence

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models of a `LogitSummary`, in its order; "other hints" is c, the mean of the controls."""
        of_anchor = ("reference",) if self.target.is_anchored else ()
        return ("student", "teacher", *of_anchor, *(("other hints",) if self.target.num_controls else ()))

    def summarise(self, logits: Sequence[Tensor], vocab: VocabShard) -> Tensor:
        """Return `LogitSummary.flat` of the logits of these models, for a `TokenMeasurement`."""
        return summarise_logits(logits, vocab, self.target.num_controls > 0).flat()

    def record(self) -> dict[str, Any]:
        """Return the settings as plain values.

        k_max is a number, "1 + w" or null; k is the number that the rule gives, or null for 1 + w and without one.
        """
        target = self.target
        return {
            "rule": target.rule,
            "teacher_weight": target.teacher_weight,
            "k_max": target.k_max,
            "k": target.k if target.rule in ("fixed", "batch") else None,
            "anchor": target.anchor,
            "match": "reference" if target.matches_reference else "student",
            "num_controls": target.num_controls,
            "divergence": self.divergence.kind,
            "jsd_lambda": self.divergence.jsd_lambda,
            "order": self.divergence.order,
            "forward_above": self.divergence.forward_above,
        }


@dataclass(frozen=True)
class ExploredResponse:
    """One response with the numbers of its tokens, on the host."""

    context: ContextPair
    solution: str
    """The hint in the teacher's prompt; "" if it has none."""
    settings: TokenTarget
    numbers: Mapping[str, list[float]]
    """One value per token for each of the loss's statistics and measures; NaN where a value is unknown."""
    summary: LogitSummary
    vocab_size: int

    @property
    def statuses(self) -> list[str]:
        """The names of `Status`, in lower case, one per token."""
        return [Status(int(value)).name.lower() for value in self.numbers["status"]]

    def record(self, tokenizer: Tokenizer, **about: Any) -> dict[str, Any]:
        """Return the response as JSON values: texts, lists with a number per token, and blocks of summaries.

        The tensors of a block are base64 of little-endian numbers (ids int32, else float32) in the shapes of
        `LogitSummary`.  ``about``: further entries, such as the step.
        """
        ids = self.context.response
        known = self.summary.ids[self.summary.ids >= 0].long().unique().tolist()
        numbers = {name: [finite(value) for value in values] for name, values in self.numbers.items()}
        numbers["k"] = [None if value is None or value == 0 else 1 / value for value in numbers.pop("beta")]
        del numbers["status"]
        return {
            **about,
            "problem_id": self.context.problem_id,
            "prompt": tokenizer.decode(self.context.student_prompt),
            "solution": self.solution,
            "truncated": self.context.truncated,
            **(asdict(self.context.turn) if self.context.turn else {}),
            "vocab_size": self.vocab_size,
            "models": list(self.settings.models),
            "settings": self.settings.record(),
            "block_tokens": BLOCK_TOKENS,
            "tokens": {"id": list(ids), "text": pieces(ids, tokenizer), "status": self.statuses, **numbers},
            "texts": {str(token): tokenizer.decode([token]) for token in known},
            "blocks": [self._block(start) for start in range(0, len(ids), BLOCK_TOKENS)],
        }

    def _block(self, start: int) -> dict[str, str]:
        rows = slice(start, start + BLOCK_TOKENS)
        encoded = {}
        for name, values in vars(self.summary).items():
            numbers = values[rows].contiguous().numpy().astype("<i4" if name == "ids" else "<f4")
            encoded[name] = base64.b64encode(numbers.tobytes()).decode()
        return encoded


def cut(context: ContextPair) -> ContextPair:
    """Return the context with at most the first `LONGEST` tokens of its response."""
    return context if len(context.response) <= LONGEST else replace(context, response=context.response[:LONGEST])


def explored_responses(
    output: StepOutput,
    contexts: Sequence[ContextPair],
    solutions: Sequence[str],
    settings: TokenTarget,
    vocab_size: int,
    grid: RankGrid,
) -> list[ExploredResponse]:
    """Return ``contexts``, all of one replica, as explored responses, on each rank of the replica.

    ``output``: of the packed contexts, with summaries among its measures.  ``solutions``: one per context.
    Collectives: those of `gathered_rows` on the ranks of the replica.
    """
    num_models, names = len(settings.models), (*_STATS, *_MEASURES)
    names += _OF_CONTROLS if settings.target.num_controls else ()
    spans, start = [], 0
    for context in contexts:
        spans.append(range(start, start + len(context.response)))
        start += len(context.response)
    width = len(names) + LogitSummary.width(num_models)
    rows = gathered_rows(_rows(output), output.response_ids, spans, width, grid).cpu()
    found = []
    per_context = zip(contexts, solutions, rows.split([len(span) for span in spans]), strict=True)
    for context, solution, part in per_context:
        numbers = dict(zip(names, part[:, : len(names)].t().tolist(), strict=True))
        summary = LogitSummary.of_flat(part[:, len(names) :], num_models)
        found.append(ExploredResponse(context, solution, settings, numbers, summary, vocab_size))
    return found


def _rows(output: StepOutput) -> Tensor | None:
    """Return the numbers and summaries [R, width] of the tokens of this rank; None if it has none."""
    stats, measures = output.stats, output.measures
    if stats is None or measures is None:
        return None
    assert measures.summary is not None, "the measurement was asked for summaries"
    entropy = measures.reference_entropy if output.anchor_entropy is None else output.anchor_entropy
    unknown = torch.full_like(measures.mass_on_rare_student, math.nan)
    columns = [getattr(stats, name).double() for name in _STATS]
    columns += [measures.mass_on_rare_student, unknown if entropy is None else entropy.double()]
    columns += [] if measures.kl_of_control is None else measures.kl_of_control.unbind(1)
    return torch.cat([torch.stack(columns, 1), measures.summary], 1)


def explore_run(trainer: Trainer) -> None:
    """Keep responses of the run for the explorer from now on, and forget those of steps that the run repeats.

    Every rank calls this function before the first step.
    Raises: OSError, as `CheckpointError` on all ranks, where a file of an earlier launch cannot be removed.
    """
    if not trainer.config.dry_run:
        with raise_on_all_ranks():
            if trainer.grid.is_reporter:
                forget_explored_after(trainer.run_dir, trainer.step)
    config = trainer.config
    is_evaluated = config.evaluation.every or config.evaluation.at_start
    shows = config.shows_contents and isinstance(config.target.anchor, str)  # the page knows no shared anchor
    if is_evaluated and config.has_teacher and shows and config.metrics.num_explored > 0:
        trainer.before_gradients.append(_save_explored)


def _save_explored(trainer: Trainer, batch: StepBatch) -> None:
    """Save the first samples of the batch of the first replica, where the step ends with an evaluation.  Collective.

    The records never stop a run: an error while making or writing them becomes a warning of one line.
    """
    config, step, tokenizer = trainer.config, trainer.step + 1, trainer.run_data.tokenizer
    if not (evaluation_due(config, step) or (step == 1 and config.evaluation.at_start)):
        return
    trainer.sampler.sleep()
    with trainer.phases("evaluation"), contextlib.suppress(schedule.NoResponseTokens):
        found = explored_of(trainer.learner, batch, config.metrics.num_explored)
        if not found or not trainer.grid.is_reporter:
            return
        try:
            write_explored(trainer.run_dir, step, [one.record(tokenizer, step=step) for one in found])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            trainer.log.warn(f"the responses of step {step} are not saved for the explorer: {reason}")


def explored_of(learner: Learner, batch: StepBatch, count: int) -> list[ExploredResponse]:
    """Return responses to the first ``count`` problems of the first replica, under the learner's present weights.

    Of episodes the function returns the first ``count`` turns, episode by episode.
    ``batch``: the batch of a step, whose contexts one teacher reads.  Every rank of the first replica gets the result;
    the other replicas get none.  Nothing is trained.
    Collectives: those of `Learner.measure`, and those of `explored_responses` in the first replica.
    Raises: `NoResponseTokens` on all ranks where the first replica has no response token.
    """
    contexts = batch.contexts
    first = chosen(contexts, count)[:count] if learner.grid.dp_rank == 0 else []
    shown = [cut(context) for context, _ in first]
    divergence = Divergence.configured(learner.config.loss, learner.config.method)
    settings = TokenTarget(learner.target_of(batch.teacher), divergence)
    output = learner.measure(shown, summarise=settings.summarise, teacher=batch.teacher)
    if not shown:
        return []
    solution_of = {id(context): text for context, text in zip(contexts, batch.solutions, strict=True)}
    texts = [learner.teachers.seen_hint(context, solution_of[id(context)]).text for context, _ in first]
    return explored_responses(output, shown, texts, settings, learner.run_data.vocab_size, learner.grid)
