# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Small chat templates: ChatML with tools, a template that drops earlier reasoning, and templates that lose text."""

from __future__ import annotations

_HEAD = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' }}[call] {{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}"
)
_GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

CHATML = (
    _HEAD
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    + _CALLS
    + "<|im_end|>\n{% endfor %}"
    + _GENERATION
)
"""ChatML, which shows everything of every turn."""

STRIPPING = _HEAD + (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m.content or '' }}{% endif %}" + _CALLS + "<|im_end|>\n{% endfor %}" + _GENERATION
)
"""A template that shows reasoning only in turns after the last message of the user, like the template of Qwen3."""

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    + _GENERATION
)
"""A template that drops all reasoning, also in the last turn."""

OPENING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""ChatML with a generation prompt that opens the reasoning."""

_CONTENT = "{{ m.content or '' }}"
ADDING = CHATML.replace(
    _CONTENT, "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}" + _CONTENT
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
"""A template that writes empty thoughts before the last reply; a switch writes them into the generation prompt, too."""
