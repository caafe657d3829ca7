# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged turns as tokens: the replies as the assistant wrote them, by the chat template, behind both prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from megatron_selfdistill.data.contexts import PromptPair, shortened_to_fit
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.errors import MissingChatTemplateError


@dataclass(frozen=True)
class Turn:
    """A logged turn that can be trained on."""

    prompts: PromptPair
    reply: list[int]
    """What the assistant wrote, its end-of-turn token included and nothing after it."""
    accepted: bool


@dataclass(frozen=True)
class Unusable:
    """A logged turn that cannot."""

    message: str
    """Why, with file and line and without quoting the log."""
    too_long: bool
    """Else: the chat template cannot show it as it was."""


@dataclass(frozen=True)
class TurnReader:
    """How turns are read, and which unusable ones are errors."""

    builder: PromptBuilder
    stop_token_ids: tuple[int, ...]
    max_length: int
    """Longest prompt + reply in tokens."""
    on_long_context: str
    """As the policy of `fit_teacher_prompt`."""
    on_bad_record: str
    """error or skip."""

    def read(self, problems: Sequence[Problem]) -> list[Turn | Unusable]:
        """Each turn's prompts and reply, or why it has none; raises nothing about a turn.

        A conversation is rendered as the model saw it at that time: ``messages`` with the generation prompt, later
        turns unknown.  (A template that strips reasoning from earlier turns strips it there.)  Rendered once more with
        the reply at the end, the text must begin with that prompt; the rest, up to the first stop token, is what the
        model wrote.  ``prompt + reply`` are the tokens of the whole text, unless one of these spans the end of the
        prompt; then the rest of the text is encoded by itself, as a model that read the prompt must have written it.

        Unusable is a turn whose text does not begin with the prompt, lacks what the log says, ends in no stop token or
        holds one before its end, or whose teacher would begin its response otherwise; and one that is too long, where
        ``on_long_context`` does not shorten it.  Raises: MissingChatTemplateError.
        """
        rendered = [self._rendered(problem) for problem in problems]
        # All texts at once: a fast tokenizer spreads them over the cores.
        encoded = iter(self.builder.tokenizer.encode_batch([t for r in rendered if isinstance(r, tuple) for t in r]))
        return [
            self._turn(problem, texts, [next(encoded) for _ in texts]) if isinstance(texts, tuple) else texts
            for problem, texts in zip(problems, rendered, strict=True)
        ]

    def check(self, turn: Turn | Unusable) -> None:
        """Raises: ValueError in one sentence for an unusable turn that may not be skipped."""
        if not isinstance(turn, Unusable):
            return
        if turn.too_long and self.on_long_context == "error":
            raise ValueError(f"{turn.message}; raise data.max_length, or choose another data.on_long_context")
        if not turn.too_long and self.on_bad_record == "error":
            raise ValueError(f"{turn.message}; or leave such turns out with data.on_bad_record=skip")

    @property
    def has_errors(self) -> bool:
        """Some unusable turns may not be skipped."""
        return "error" in (self.on_long_context, self.on_bad_record)

    def _rendered(self, problem: Problem) -> tuple[str, ...] | Unusable:
        """The texts of `PromptBuilder.pair_texts`, and the conversation with the reply at its end."""
        assert problem.reply is not None
        try:
            texts = self.builder.pair_texts(problem)
            whole = self.builder.student_text(problem, problem.reply.message)
            _check_the_reply_follows(problem, texts[1], whole)
        except MissingChatTemplateError:
            raise
        except ValueError as error:
            return Unusable(str(error), too_long=False)
        return *texts, whole

    def _turn(self, problem: Problem, texts: Sequence[str], ids: Sequence[list[int]]) -> Turn | Unusable:
        assert problem.reply is not None
        try:
            reply = self._reply(problem, texts[1], texts[4], ids[1], ids[4])
            student, teacher = self.builder.pair_of(problem, texts[:4], ids[:4])
        except ValueError as error:
            return Unusable(str(error), too_long=False)
        policy = "drop" if self.on_long_context == "error" else self.on_long_context
        prompts = shortened_to_fit(self.builder, problem, student, teacher, self.max_length - len(reply), policy)
        if prompts is None:
            return Unusable(
                f"{problem.location}: expected contexts of at most {self.max_length} tokens, got longer ones: prompts "
                f"of {len(student)} and {len(teacher)} tokens with a reply of {len(reply)}",
                too_long=True,
            )
        return Turn(prompts, reply, problem.reply.accepted)

    def _reply(self, problem: Problem, prompt: str, whole: str, prompt_ids: list[int], ids: list[int]) -> list[int]:
        where, decode = problem.location, self.builder.tokenizer.decode
        if ids[: len(prompt_ids)] == prompt_ids:
            reply = ids[len(prompt_ids) :]
        else:
            reply = self.builder.tokenizer.encode(whole[len(prompt) :])
            if decode([*prompt_ids, *reply]) != decode(ids):
                raise ValueError(
                    f"{where}: expected prompt and reply to be encoded into tokens that spell both, got another text; "
                    "the tokenizer joins the end of the generation prompt with the reply: give another "
                    "data.chat_template"
                )
        stops = [i for i, token in enumerate(reply) if token in self.stop_token_ids]
        if not stops:
            raise ValueError(
                f"{where}: expected the chat template to end the reply in a stop token, got none; name the one that it "
                "writes in rollout.stop_token_ids"
            )
        if decode(reply[stops[0] + 1 :]).strip():
            raise ValueError(f"{where}: expected a reply with a stop token at its end only, got one within its text")
        return reply[: stops[0] + 1]


@dataclass(frozen=True)
class TurnCounts:
    """Of turns that were read."""

    usable: int = 0
    num_tokens: int = 0
    """Of all usable replies."""
    num_accepted_tokens: int = 0
    """Of these: of accepted replies."""
    shortened: int = 0
    """Usable, with a part of the solution."""
    too_long: int = 0
    bad: int = 0
    """The chat template cannot show them as they were."""

    @classmethod
    def of(cls, turns: Iterable[Turn | Unusable]) -> TurnCounts:
        counts = cls()
        for turn in turns:
            if isinstance(turn, Unusable):
                counts += cls(too_long=int(turn.too_long), bad=int(not turn.too_long))
            else:
                length, shortened = len(turn.reply), int(turn.prompts.solution_truncated)
                counts += cls(1, length, length if turn.accepted else 0, shortened)
        return counts

    def __add__(self, other: TurnCounts) -> TurnCounts:
        return TurnCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.usable} can be used ({self.shortened} with a shortened solution): {self.num_tokens} logged tokens, "
            f"{self.num_accepted_tokens / max(self.num_tokens, 1):.3f} of them in accepted turns; {self.too_long} are "
            f"too long, {self.bad} cannot be shown by the chat template as they were"
        )


def _check_the_reply_follows(problem: Problem, prompt: str, whole: str) -> None:
    if not whole.startswith(prompt):
        raise ValueError(
            f"{problem.location}: expected the chat template to show the reply right behind its generation prompt, got "
            "another text there; where the generation prompt opens a reasoning that the log does not have, close it "
            "with data.chat_template_kwargs (such as enable_thinking: false), else give another data.chat_template"
        )
    _check_nothing_is_dropped(problem, whole[len(prompt) :])


def _check_nothing_is_dropped(problem: Problem, text: str) -> None:
    """A template is a program: some drop the reasoning, or the text beside a tool call."""
    assert problem.reply is not None
    message = problem.reply.message
    reasoning, _, answer = str(message.get("content", "")).rpartition("</think>")
    parts = {
        "the reasoning": reasoning.removeprefix("<think>"),
        "the text": answer,
        "the reasoning_content": str(message.get("reasoning_content", "")),
    }
    for name, part in parts.items():
        if part.strip() not in text:
            raise ValueError(
                f"{problem.location}: expected the chat template to show {name} of the reply, got a text without it; "
                "give a data.chat_template that keeps it, or take it out of the log"
            )
    calls = message.get("tool_calls", ())
    if any(call["function"]["name"] not in text for call in calls):
        raise ValueError(
            f"{problem.location}: expected the chat template to show the tool calls of the reply, got a text without "
            "them; give a data.chat_template that knows tools"
        )
