# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections data, conversations and solutions: the problems, and the hints of the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.choices import (
    BAD_RECORD_POLICIES,
    CONVERSATION_RESPONSES,
    CONVERSATION_TURNS,
    DATA_KINDS,
    LONG_CONTEXT_POLICIES,
    SOLUTION_RANKINGS,
    SOLUTION_SOURCES,
    UNLIKELY_TURN_POLICIES,
)
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class DataConfig:
    """Problems, tokenizer and prompts."""

    kind: str = "problems"
    """problems (with solutions) or conversations (logs of chats; see the section ``conversations``)."""
    path: str | None = None
    """Problems and solutions, or conversations: a file (.jsonl, .json, .csv, each also .gz, or .parquet), a folder of
    such files, a glob, or the name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set; null is its default one."""
    fields: dict[str, str] = field(default_factory=dict)
    """Our field name -> the column's name, for problem, solution, answer, id, messages; of conversations: messages,
    accepted, tools, id."""
    on_bad_record: str = "error"
    """error: the first bad record ends the run; skip: count it and go on."""
    limit: int | None = None
    """Use only the first so many records."""
    tokenizer: str | None = None
    """A Hugging Face folder or a SentencePiece .model file."""
    trust_remote_code: bool = False
    """Run the Python code in the tokenizer's folder that its auto_map names.  The code can do whatever you can do: read
    it first."""
    allow_other_tokenizer: bool = False
    """Take a tokenizer whose tokens differ from those of the tokenizer that the checkpoint carries."""
    chat_template: str | None = None
    """Jinja chat template (or the path of one); null takes the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables for the chat template, such as enable_thinking."""
    system_prompt: str | None = None
    """Put before the conversation in both contexts."""
    student_template: str = "{problem}"
    """What the student is shown."""
    teacher_template: str | None = None
    """What the teacher is shown, with the slots {problem} and {solution}; null takes the wording in
    prompts.py."""
    global_batch_size: int = 32
    """Problems (of conversations: turns) per step, over all data-parallel ranks."""
    max_length: int | None = None
    """Longest context in tokens; null is model.max_position_embeddings."""
    on_long_context: str = "error"
    """What to do where the teacher's context cannot fit: error, drop, truncate_start or truncate_end of the
    solution."""
    solutions: str = "given"
    """Which solutions the teacher is shown: given (the data's) or own (the model's own responses whose answer verifies;
    see the section ``solutions``)."""

    def __post_init__(self) -> None:
        normalise("data", self)
        one_of("data.kind", self.kind, DATA_KINDS)
        one_of("data.solutions", self.solutions, SOLUTION_SOURCES)
        one_of("data.on_bad_record", self.on_bad_record, BAD_RECORD_POLICIES)
        one_of("data.on_long_context", self.on_long_context, LONG_CONTEXT_POLICIES)
        at_least(1, "data", self, "global_batch_size limit max_length")
        known = {"problem", "solution", "answer", "id", "messages"}
        if self.kind == "conversations":
            known |= {"accepted", "tools"}
        for name in self.fields:
            one_of("a key of data.fields", name, sorted(known))


@dataclass(frozen=True)
class ConversationsConfig:
    """Which turns of logged conversations are trained on, and how (data.kind=conversations)."""

    accepted_rule: str = "closing_turn"
    """Which answer the user was content with, where the log has no mark: closing_turn (the last assistant message
    before the last user turn, if that says thanks or goes on, and is neither a correction nor a repeat), marked (only
    marks count), or the dotted path of ``rule(messages) -> index or None``."""
    turns: str = "all"
    """all (also the accepted turn, with its own text as the hint) or before_accepted."""
    responses: str = "logged"
    """logged (the tokens of the log: nothing is sampled, no sampler is built) or sampled (a fresh rollout of each
    turn)."""
    min_log_prob: float | None = None
    """Logged turns whose mean log-prob per token under the student lies below this, in nats, are unlikely; null: none
    is."""
    unlikely: str = "drop"
    """What becomes of unlikely turns: drop (weight 0 in the loss) or down_weight (exp(mean - min_log_prob))."""
    show_contents: bool = False
    """Messages about bad records may quote the log, and metrics.show_samples shows turns of it."""

    def __post_init__(self) -> None:
        normalise("conversations", self)
        one_of("conversations.turns", self.turns, CONVERSATION_TURNS)
        one_of("conversations.responses", self.responses, CONVERSATION_RESPONSES)
        one_of("conversations.unlikely", self.unlikely, UNLIKELY_TURN_POLICIES)
        require(
            self.min_log_prob is None or self.min_log_prob <= 0,
            f"conversations.min_log_prob is a log-prob in nats, at most 0, got {self.min_log_prob}",
        )


@dataclass(frozen=True)
class SolutionsConfig:
    """The model's own verified responses as solutions (data.solutions=own)."""

    refresh_every: int = 50
    """Steps after which the coming steps' problems are solved anew, by the weights of that moment."""
    num_samples: int = 8
    """Responses per problem, drawn as rollout.* says, among which solutions are looked for."""
    keep: int = 2
    """Verified responses kept per problem; a step shows the teacher the best one that is not the response itself."""
    pick: str = "shortest"
    """Which of the verified ones are kept: shortest, most_likely (mean log-prob under the student), random, or
    learnable (the score of pipeline/score.py)."""
    alpha: float = 0.01
    """With pick=learnable: weight of the least likely token, and of the largest teacher-student log-ratio."""

    def __post_init__(self) -> None:
        normalise("solutions", self)
        at_least(1, "solutions", self, "refresh_every num_samples keep")
        at_least(0, "solutions", self, "alpha")
        one_of("solutions.pick", self.pick, SOLUTION_RANKINGS)
