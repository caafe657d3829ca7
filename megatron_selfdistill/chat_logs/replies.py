# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged turns as tokens: both prompts, and the reply as the assistant sampled it, by the chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_selfdistill.config import DataConfig
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.fitted_prompts import shortened_to_fit
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.thoughts import num_thoughts, parts
from megatron_selfdistill.errors import ConfigError, MissingChatTemplateError

SKIPPED_FILE = "skipped.txt"


@dataclass(frozen=True)
class Turn:
    """A logged turn that can be trained on."""

    prompts: PromptPair
    reply: list[int]
    """Token ids that the assistant sampled, up to and including its end-of-turn token."""
    accepted: bool
    """Whether the user accepted this reply."""


@dataclass(frozen=True)
class Unusable:
    """A logged turn that cannot be trained on."""

    message: str
    """Reason, with file and line, without a quotation of the log."""
    too_long: bool
    """Whether the turn is too long; otherwise the chat template cannot render it as it was."""


@dataclass(frozen=True)
class TurnReader:
    """The reader of turns, with the rules for unusable turns."""

    builder: PromptBuilder
    ends: EndTokens
    """The tokens that end a reply."""
    max_length: int
    """Largest length of a prompt and the reply together, in tokens."""
    data: DataConfig
    """The configuration, whose policies ``on_long_context`` and ``on_bad_record`` are for unusable turns."""

    def read(self, problems: Sequence[Problem]) -> list[Turn | Unusable]:
        """Return prompts and reply of each turn, or the reason why the turn is unusable.

        A conversation is rendered as the model saw it at that time: ``messages`` with the generation prompt, without
        later turns.  (A template that strips reasoning from earlier turns strips it there.)  Rendered once more with
        the reply at its end, the text must begin with that prompt; the rest, up to the first stop token, is the reply.
        Prompt and reply are the tokens of the whole text, unless a token spans the end of the prompt.  In that case the
        rest of the text is encoded by itself, as a model that had read the prompt must have sampled it.

        A turn is unusable if its text does not begin with the prompt, lacks a part of the logged reply, does not end in
        a stop token or has one before its end; if the teacher would begin its response after other tokens; and if the
        turn is too long and ``on_long_context`` does not shorten it.

        Raises: MissingChatTemplateError, and nothing about a single turn.
        """
        rendered = [self._rendered(problem) for problem in problems]
        # All texts at once: a fast tokenizer spreads them over the cores.
        encoded = iter(self.builder.tokenizer.encode_batch([t for r in rendered if isinstance(r, tuple) for t in r]))
        return [
            self._turn(problem, texts, [next(encoded) for _ in texts]) if isinstance(texts, tuple) else texts
            for problem, texts in zip(problems, rendered, strict=True)
        ]

    def check(self, turn: Turn | Unusable) -> None:
        """Raise `ConfigError` for an unusable turn that may not be skipped."""
        if not isinstance(turn, Unusable):
            return
        if turn.too_long and self.data.on_long_context == "error":
            raise ConfigError(
                f"{turn.message}; raise data.max_length, or set data.on_long_context to drop or truncate_*"
            )
        if not turn.too_long and self.data.on_bad_record == "error":
            raise ConfigError(f"{turn.message}; or skip such turns with data.on_bad_record=skip")

    def _rendered(self, problem: Problem) -> tuple[str, ...] | Unusable:
        """Return the texts of `PromptBuilder.pair_texts`, and the conversation with the reply at its end."""
        assert problem.reply is not None
        try:
            texts = self.builder.pair_texts(problem)
            whole = self.builder.student_text(problem, problem.reply.message)
            _check_reply(problem, texts[1], whole)
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
        policy = "drop" if self.data.on_long_context == "error" else self.data.on_long_context
        prompts = shortened_to_fit(self.builder, problem, student, teacher, self.max_length - len(reply), policy)
        if prompts is None:
            return Unusable(
                f"{problem.location}: expected contexts of at most {self.max_length} tokens, got longer ones: prompts "
                f"of {len(student)} and {len(teacher)} tokens with a reply of {len(reply)}",
                too_long=True,
            )
        return Turn(prompts, reply, problem.reply.accepted)

    def _reply(self, problem: Problem, prompt: str, whole: str, prompt_ids: list[int], ids: list[int]) -> list[int]:
        assert problem.reply is not None
        where, decode = problem.location, self.builder.tokenizer.decode
        if ids[: len(prompt_ids)] == prompt_ids:
            reply = ids[len(prompt_ids) :]
        else:
            reply = self.builder.tokenizer.encode(whole[len(prompt) :])
            if decode([*prompt_ids, *reply]) != decode(ids):
                raise ValueError(f"{where}: expected the tokens of prompt and reply to spell both (data.chat_template)")
        stops = [i for i, token in enumerate(reply) if token in self.ends.ids]
        if not stops and self.ends.reply_end is not None and not problem.reply.message.get("tool_calls"):
            return [*reply, self.ends.reply_end]  # the template writes it before the next message only
        if not stops:
            raise ValueError(
                f"{where}: expected the chat template to end the reply in one of rollout.stop_token_ids, got none"
            )
        if decode([token for token in reply[stops[0] + 1 :] if token not in self.ends.ids]).strip():
            raise ValueError(f"{where}: expected a reply with a stop token at its end only, got one within its text")
        return reply[: stops[0] + 1]


def turn_counts(turns: Iterable[Turn | Unusable]) -> Counter[str]:
    """Return the numbers of turns that were read, and of their tokens.

    usable, and of these shortened (the teacher sees a part of the solution), tokens and accepted_tokens (of the replies
    that the user accepted); too_long; and bad: the chat template cannot render the turn as it was.
    """
    counts: Counter[str] = Counter()
    for turn in turns:
        if isinstance(turn, Unusable):
            counts["too_long" if turn.too_long else "bad"] += 1
        else:
            length, shortened = len(turn.reply), int(turn.prompts.solution_truncated)
            counts.update(usable=1, tokens=length, accepted_tokens=length * turn.accepted, shortened=shortened)
    return counts


def about_turns(counts: Counter[str]) -> str:
    """Return `turn_counts` as a text for the log."""
    return (
        f"{counts['usable']} can be used ({counts['shortened']} with a shortened solution): {counts['tokens']} logged "
        f"tokens, {counts['accepted_tokens'] / max(counts['tokens'], 1):.3f} of them in accepted turns; "
        f"{counts['too_long']} are too long, {counts['bad']} cannot be shown by the chat template as they were"
    )


def _check_reply(problem: Problem, prompt: str, whole: str) -> None:
    """Raise ValueError if ``whole`` lacks a part of the reply after the prompt, or has thoughts that the reply lacks.

    Some templates drop the reasoning, or the text beside a tool call.  Others write empty thoughts into a reply without
    thoughts, or write the thoughts of its content a second time.
    """
    assert problem.reply is not None
    if not whole.startswith(prompt):
        raise ValueError(
            f"{problem.location}: expected the chat template to show the reply right after its generation prompt; a "
            "reasoning block that this opens is closed by data.chat_template_kwargs (such as enable_thinking: false)"
        )
    message, text = problem.reply.message, whole[len(prompt) :]
    content = str(message.get("content", ""))
    reasoning, answer = parts(content)
    names = ("reasoning_content", "reasoning", "thinking")
    apart = {f"the {name}": str(message[name]) for name in names if message.get(name)}
    for name, part in {"the reasoning": reasoning or "", "the text": answer, **apart}.items():
        if part.strip() not in text:
            raise ValueError(f"{problem.location}: expected the chat template to show {name} of the reply")
    if num_thoughts(text) > num_thoughts(content) + bool(apart):
        raise ValueError(
            f"{problem.location}: expected the reply as the assistant wrote it, got thoughts that the template adds: "
            "switch them off with data.chat_template_kwargs={enable_thinking: false}"
        )
    if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
        raise ValueError(f"{problem.location}: expected the chat template to show the tool calls of the reply")
