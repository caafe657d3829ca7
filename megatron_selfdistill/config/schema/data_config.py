# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``data``, ``conversations`` and ``solutions`` of the schema: problems, and hints for the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_selfdistill.choices import (
    ACCEPTED_RULES,
    BAD_RECORD_POLICIES,
    CONVERSATION_RESPONSES,
    CONVERSATION_TURNS,
    DATA_KINDS,
    HINDSIGHT_HINTS,
    LONG_CONTEXT_POLICIES,
    SOLUTION_RANKINGS,
    SOLUTION_SOURCES,
    UNLIKELY_TURN_POLICIES,
)
from megatron_selfdistill.config.schema.field_checks import check_fields, require_range
from megatron_selfdistill.config.schema.ranges import (
    FilePath,
    LogProb,
    Name,
    NonNegativeFloat,
    OneOf,
    PositiveInt,
    Text,
    is_dotted,
)


@dataclass(frozen=True)
class DataConfig:
    """The problems, the tokenizer and the prompts."""

    kind: Annotated[str, OneOf(DATA_KINDS)] = "problems"
    """The kind of the records: problems (with solutions), or conversations (chat logs; see the section
    conversations)."""
    path: FilePath | None = None
    """The place of the records: a file (.jsonl, .json, .csv, each also .gz, or .parquet), a directory of such files, a
    glob, or the name of a data set on the Hugging Face hub."""
    split: Name = "train"
    """Split of a hub data set."""
    subset: Text | None = None
    """Subset (configuration) of a hub data set; null is the default subset."""
    fields: dict[str, Text] = field(default_factory=dict)
    """Name of a field -> name of the column that holds it.  Problems have the fields problem, solution, answer, id and
    messages; conversations have messages, accepted, tools and id."""
    on_bad_record: Annotated[str, OneOf(BAD_RECORD_POLICIES)] = "error"
    """The reaction to a bad record: error (the run ends) or skip (the record is counted and skipped)."""
    limit: PositiveInt | None = None
    """Number of records that are used, from the first one on; null is all."""
    tokenizer: FilePath | None = None
    """The tokenizer: a Hugging Face directory or a SentencePiece .model file."""
    trust_remote_code: bool = False
    """Whether to run the Python code in the tokenizer's directory that its auto_map names.  The code can do whatever
    you can do: read it first."""
    allow_other_tokenizer: bool = False
    """Whether the tokens of the tokenizer may differ from the tokens of the tokenizer in the checkpoint."""
    chat_template: FilePath | None = None
    """Chat template in Jinja, or the path of its file; null takes the template of the tokenizer."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as enable_thinking."""
    system_prompt: Text | None = None
    """System prompt of both contexts; null is none."""
    student_template: Text = "{problem}"
    """The student's user message, with the slot {problem}."""
    teacher_template: Text | None = None
    """The teacher's user message, with the slots {problem} and {solution}; null takes the wording in
    data/prompts.py for data.solutions."""
    global_batch_size: PositiveInt = 32
    """Number of problems (of turns, where the records are conversations) per step, over all data-parallel ranks."""
    max_length: PositiveInt | None = None
    """Length of the longest context, in tokens; null is model.max_position_embeddings, or the longest packed sequence
    (schedule.max_tokens) if that is shorter."""
    on_long_context: Annotated[str, OneOf(LONG_CONTEXT_POLICIES)] = "error"
    """The reaction to a teacher's context that is too long: error, drop (the problem is skipped), or truncate_start or
    truncate_end (this end of the solution is cut off)."""
    solutions: Annotated[str, OneOf(SOLUTION_SOURCES, or_dotted=True)] = "given"
    """The hint that the teacher sees: given (the solution of the data), answer (the answer of the data alone), own
    (an earlier response of the model whose answer is right; see the section solutions), skill (a lesson of an earlier
    response to the problem; see the section hints), next_state (what the next message of a log reveals about a logged
    reply; needs data.kind=conversations, and see the section hints), peer (another right response
    among rollout.num_samples of the same step), feedback (the environment's text about the response), peer_or_feedback
    (a peer, or feedback where there is none, each under a heading) or the dotted path of a function ``hints(problem,
    responses)``, which gets the text and the reward of each response to the problem and returns a text or None for
    each.  From peer on, the hint is known after the sampling, and a response without a hint has no teacher."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        known = {"problem", "solution", "answer", "id", "messages"}
        if self.kind == "conversations":
            known |= {"accepted", "tools"}
        for name in self.fields:
            require_range("a key of data.fields", Annotated[str, OneOf(tuple(sorted(known)))], name)

    @property
    def hints_follow_responses(self) -> bool:
        """Whether the hint for the teacher is known only once the responses of a step are sampled."""
        return self.solutions in HINDSIGHT_HINTS or is_dotted(self.solutions)

    @property
    def compares_responses(self) -> bool:
        """Whether the hint for a response depends on the other responses to its problem."""
        return self.hints_follow_responses and self.solutions != "feedback"


@dataclass(frozen=True)
class ConversationsConfig:
    """The training on turns of logged conversations (data.kind=conversations)."""

    accepted_rule: Annotated[str, OneOf(ACCEPTED_RULES, or_dotted=True)] = "closing_turn"
    """Rule that finds the answer that the user accepted, where the log has no mark: closing_turn (the last assistant
    message before the last user message, if the user then says thanks or goes on, and neither corrects nor repeats
    anything), marked (only marks count), or the dotted path of a function ``rule(messages) -> index or None``."""
    turns: Annotated[str, OneOf(CONVERSATION_TURNS)] = "all"
    """Turns that are trained on: all (the accepted turn too, with its own text as the hint) or before_accepted."""
    responses: Annotated[str, OneOf(CONVERSATION_RESPONSES)] = "logged"
    """The responses: logged (the tokens of the log; nothing is sampled, and no sampler is built) or sampled (a new
    rollout for each turn)."""
    min_log_prob: LogProb | None = None
    """Bound below which the mean log-prob per token under the student makes a logged turn unlikely, in nats; null: no
    turn is unlikely."""
    unlikely: Annotated[str, OneOf(UNLIKELY_TURN_POLICIES)] = "drop"
    """Weight of unlikely turns in the loss: drop (weight 0) or down_weight (exp(mean log-prob - min_log_prob))."""
    show_contents: bool = False
    """Whether messages about bad records may quote the log, and metrics.show_samples may show its turns."""

    def __post_init__(self) -> None:
        check_fields("conversations", self)


@dataclass(frozen=True)
class SolutionsConfig:
    """Responses of the model whose answer is right, used as solutions (data.solutions=own)."""

    refresh_every: PositiveInt = 50
    """Number of steps after which the present weights solve the problems of the coming steps anew."""
    num_samples: PositiveInt = 8
    """Number of responses per problem, sampled with the settings of rollout, among which the search finds solutions."""
    keep: PositiveInt = 2
    """Number of right responses kept per problem; the teacher sees the best one that is not the response itself."""
    pick: Annotated[str, OneOf(SOLUTION_RANKINGS)] = "shortest"
    """Rule that ranks the right responses: shortest, most_likely (mean log-prob under the student), random, or
    learnable (the score of pipeline/score.py)."""
    alpha: NonNegativeFloat = 0.01
    """Weight of the least likely token and of the largest divergence from the teacher under pick=learnable."""
    ratio_weight: NonNegativeFloat = 1.0
    """Weight of the divergence of the student from the teacher against the log-prob of the response under
    pick=learnable; 0 ranks by the log-prob alone."""

    def __post_init__(self) -> None:
        check_fields("solutions", self)
