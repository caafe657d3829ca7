# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged replies as the tokens that the assistant wrote, by the chat template, behind the prompts that it saw."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from megatron_selfdistill.data.contexts import ContextCounts, PromptPair, fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder


@dataclass(frozen=True)
class FittingTurns:
    """Turns whose contexts fit, and what became of the others."""

    problems: list[Problem]
    counts: ContextCounts
    num_tokens: int = 0
    """Of all replies that fit."""
    num_accepted_tokens: int = 0
    """Of these: of accepted replies."""
    num_bad: int = 0
    """Turns that the chat template cannot show as they were."""
    left_out: list[str] = field(default_factory=list)
    """One sentence with file and line for each turn that is not there."""


def reply_tokens(builder: PromptBuilder, problem: Problem, stop_token_ids: Collection[int]) -> list[int]:
    """The tokens of ``problem.reply``, its end-of-turn token included and nothing after it.

    The conversation is rendered as the model saw it at that time: ``messages`` with the generation prompt, later turns
    unknown.  (A template that strips reasoning from earlier turns strips it there.)  Rendered once more with the reply
    at the end, the text must begin with that prompt; the rest, up to the first stop token, is what the model wrote.
    ``prompt + reply_tokens`` are the tokens of the whole text, unless one of these spans the end of the prompt; then
    the rest of the text is encoded by itself, as a model that read the prompt must have written it.

    Raises: ValueError in one sentence, with file and line and without quoting the log, where the rendered text does
    not begin with the prompt, lacks what the log says, ends in no stop token, or holds one before its end.
    """
    assert problem.reply is not None
    where = problem.location
    prompt, whole = builder.student_text(problem), builder.student_text(problem, problem.reply.message)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: expected the chat template to show the reply right behind its generation prompt, got another "
            "text there; where the generation prompt opens a reasoning that the log does not have, close it with "
            "data.chat_template_kwargs (such as enable_thinking: false), else give another data.chat_template"
        )
    text = whole[len(prompt) :]
    _check_nothing_is_dropped(problem, text)
    encode, decode = builder.tokenizer.encode, builder.tokenizer.decode
    prompt_ids, ids = encode(prompt), encode(whole)
    reply = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else encode(text)
    if decode([*prompt_ids, *reply]) != decode(ids):
        raise ValueError(
            f"{where}: expected prompt and reply to be encoded into tokens that spell both, got another text; the "
            "tokenizer joins the end of the generation prompt with the reply: give another data.chat_template"
        )
    stops = [i for i, token in enumerate(reply) if token in stop_token_ids]
    if not stops:
        raise ValueError(
            f"{where}: expected the chat template to end the reply in a stop token, got none; name the one that it "
            "writes in rollout.stop_token_ids"
        )
    if decode(reply[stops[0] + 1 :]).strip():
        raise ValueError(f"{where}: expected a reply with a stop token at its end only, got one within its text")
    return reply[: stops[0] + 1]


def fitting_turns(
    builder: PromptBuilder,
    problems: Sequence[Problem],
    *,
    stop_token_ids: Collection[int],
    max_length: int,
    policy: str,
    on_bad_record: str,
) -> FittingTurns:
    """The turns whose reply can be shown as it was, and whose prompts with it have at most ``max_length`` tokens.

    ``policy``: as for `fit_teacher_prompt`.  ``on_bad_record``: error or skip, for what `reply_tokens` raises.
    Raises: ValueError in one sentence at the first that is not skipped, dropped or shortened.
    """
    kept, left_out, counts = [], [], ContextCounts()
    num_tokens = num_accepted = num_bad = 0
    for problem in problems:
        try:
            tokens = reply_tokens(builder, problem, stop_token_ids)
        except ValueError as error:
            if on_bad_record == "error":
                raise ValueError(f"{error}; or leave such turns out with data.on_bad_record=skip") from None
            left_out.append(str(error))
            num_bad += 1
            continue
        pair = fitted(builder, problem, len(tokens), max_length, "drop" if policy == "error" else policy)
        if pair is None:
            sentence = (
                f"{problem.location}: expected contexts of at most {max_length} tokens, got longer ones with a reply "
                f"of {len(tokens)}"
            )
            if policy == "error":
                raise ValueError(f"{sentence}; raise data.max_length, or choose another data.on_long_context")
            left_out.append(sentence)
            counts += ContextCounts(dropped=1)
            continue
        counts += ContextCounts(truncated=1) if pair.solution_truncated else ContextCounts(kept=1)
        kept.append(problem)
        num_tokens += len(tokens)
        num_accepted += len(tokens) if problem.reply is not None and problem.reply.accepted else 0
    return FittingTurns(kept, counts, num_tokens, num_accepted, num_bad, left_out)


def fitted(
    builder: PromptBuilder, problem: Problem, num_reply_tokens: int, max_length: int, policy: str
) -> PromptPair | None:
    """`fit_teacher_prompt` with room for this reply; None where it is too long by itself."""
    if num_reply_tokens >= max_length:
        return None
    return fit_teacher_prompt(builder, problem, max_length=max_length, max_new_tokens=num_reply_tokens, policy=policy)


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
