# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference pages of the public functions and classes.  mkdocstrings reads them from the sources, unimported."""

from __future__ import annotations

PACKAGE = "megatron_selfdistill"
PAGES = {
    "loss": (
        "Loss",
        "loss.definition loss.target loss.sharded.vocab_parallel loss.sharded.fused_linear loss.weighting",
    ),
    "pipeline": (
        "A step through the pipeline",
        "pipeline.schedule teacher pipeline.batch pipeline.score",
    ),
    "trainer": (
        "Trainer and sources of responses",
        "trainer learner sources.source sources.configured_source",
    ),
    "methods": (
        "Methods",
        "config.schema.method_config config.methods sources.method methods.default methods.parts.settings "
        "methods.parts.terms sources.signals sources.step_terms sources.rollouts "
        "sources.judge environments.environment data.episode_reply",
    ),
    "rollouts": ("Samplers", "rollout.base rollout.sampling rollout.factory"),
    "data": (
        "Data",
        "data.problems data.records data.tokenizer data.prompts data.prompt_templates data.contexts "
        "chat_logs.conversations chat_logs.acceptance",
    ),
    "config": ("Configuration", "config.compose config.key_list config.bound_keys"),
    "evaluation": (
        "Evaluation",
        "evaluation.held_out evaluation.evaluation_result evaluation.estimators evaluation.verify "
        "evaluation.evaluations",
    ),
    "checkpoints": (
        "Checkpoints and Hugging Face",
        "interop.conversion interop.describe interop.peft_adapters "
        "adapters.stored_adapters adapters.low_rank_adapters interop.export",
    ),
    "metrics": ("Metrics and guards", "metrics.log metrics.run_log metrics.step metrics.guards"),
}
"""Name of a page under reference/api -> its title, and its modules in the order of the page."""


def pages() -> dict[str, str]:
    """Return each page's path in the site with its Markdown, in which mkdocstrings replaces the lines with ``:::``."""
    return {f"reference/api/{name}.md": _page(title, modules.split()) for name, (title, modules) in PAGES.items()}


def _page(title: str, modules: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {PACKAGE}.{module}" for module in modules)]) + "\n"
