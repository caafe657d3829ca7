# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A chat template that takes all memory or all time is refused before a run renders it."""

from __future__ import annotations

import subprocess

import pytest

from megatron_selfdistill.data import template_trial
from megatron_selfdistill.data.template_trial import try_chat_template

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m['content'] | trim }}{% endfor %}{{ eos_token }}"
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", DOUBLED], ids=["a product", "doubled in a loop"])
def test_a_template_that_takes_all_memory_is_refused(template):
    with pytest.raises(
        ValueError, match=r"^DIR: the chat template took more than 2 GiB of memory .* data.chat_template"
    ):
        try_chat_template("DIR", template, {})


def test_a_template_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(template_trial, "LIMIT_S", 3.0)
    with pytest.raises(ValueError, match=r"^DIR: the chat template did not end within 3 s"):
        try_chat_template("DIR", SLOW, {})


def test_templates_that_models_publish_pass(monkeypatch):
    published = (
        "{%- macro shown(m) %}{{ m.content * 2 }}{% endmacro %}{% for m in messages %}{{ shown(m) }}{% endfor %}"
    )
    refusing = "{{ raise_exception('only tools') }}{{ 'a' * 2 }}"
    for template in (published, refusing, "{{ no syntax", None, {"default": PLAIN}):
        try_chat_template("DIR", template, {"eos_token": "</s>", "additional": ["x"]})


def test_a_template_that_writes_each_message_once_needs_no_trial(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child process"))
    try_chat_template("DIR", PLAIN, {"eos_token": "</s>"})
    nested = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
    for template in (nested, "{{ 2 * 3 }}", "{% for i in range(9) %}x{% endfor %}", "{% set x = 1 %}", "{{ f(1) }}"):
        with pytest.raises(pytest.fail.Exception, match="a child process"):
            try_chat_template("DIR", template, {})
