# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The builders of tiny things that tests share: problems, prompts, rollouts, models beside their data.

`tiny_run` has the overrides of a run and starts it; `models` has models in every layout; this module has the rest.
Each builder imports what it needs when it is called, so that a test of one room loads no other room.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_selfdistill.data.problems import Problem
    from megatron_selfdistill.data.prompts import PromptBuilder


def problem(text: str = "3 - 4", solution: str = "hint", answer: str | None = None, **fields: Any) -> Problem:
    """Return a problem with one user message; ``fields`` replaces its id, place and further fields."""
    from megatron_selfdistill.data.problems import Problem

    own = {"id": "p", "messages": ({"role": "user", "content": text},), "location": "file.jsonl:1"}
    return Problem(**{**own, "solution": solution, "answer": answer, **fields})


def builder(tokenizer: Any, chat_template: str | None = None, **templates: Any) -> PromptBuilder:
    """Return the builder of prompts for a tokenizer or its directory; ``templates`` are those of `PromptTemplates`."""
    from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
    from megatron_selfdistill.data.tokenizer_files import load_tokenizer

    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(tokenizer, chat_template=chat_template)
    return PromptBuilder(tokenizer, PromptTemplates(**templates))


def model_with_data(directory: Path, num_problems: int, seed: int = 0, *, checkpoint: bool = True) -> Path:
    """Write problems, a tokenizer and an untrained model into ``directory``; return the directory.

    ``problems.jsonl`` and ``tokenizer`` are those of `tiny_run.write_data`; ``hf`` is a Hugging Face directory of Qwen3
    with this tokenizer, and ``megatron`` the same model as a checkpoint.
    """
    import hf_models
    import tiny_run

    tiny_run.write_data(directory, num_problems)
    hf_models.write("qwen3", directory / "hf", seed, vocab_size=23)
    shutil.copytree(directory / "tokenizer", directory / "hf", dirs_exist_ok=True)
    if checkpoint:
        from megatron_selfdistill.interop.conversion import hf_to_megatron

        hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def given(max_length: int = 40, teacher: str = "{problem}|{solution}", max_new_tokens: int = 8, **options: Any) -> Any:
    """Return prompts with given solutions, with one token per character; ``options``: see `made_methods.given_with`."""
    from characters import Characters
    from made_methods import given_with

    return given_with(Characters(), teacher, max_length, max_new_tokens, **options)


def rollout(text: str, reward: float = 0.0, group: int = 0, *, prompts: Any = None, **fields: Any) -> Any:
    """Return a rollout of the letters of ``text``, which is whole if it ends in $.

    ``prompts``: whose ``prompts(problem)`` or ``pair(problem)`` are shown, such as a method; else those of `given`.
    ``fields``: further ones of `Rollout`, such as the problem, which else is `problem("1+7", "given", "8")`.
    """
    from made_methods import response_of

    from megatron_selfdistill.sources.rollouts import Rollout

    asked = fields.pop("problem", None) or problem("1+7", "given", "8")
    prompts = prompts or given()
    pair = prompts.pair(asked) if hasattr(prompts, "pair") else prompts.prompts(asked)
    return Rollout(asked, pair, response_of(text), group, reward, **fields)


def problem_with(answer: str | None) -> Problem:
    """Return a problem of which only the answer matters."""
    return problem("?", "so", answer, location="file.jsonl:7")


def needed_by(recipe: str) -> list[str]:
    """Return the overrides without which a recipe is refused: an environment, where the recipe has episodes."""
    from megatron_selfdistill.config.key_list import config_dir

    has_episodes = "\nenvironment:" in (config_dir() / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8")
    return ["environment.name=replying.Replying"] if has_episodes else []
