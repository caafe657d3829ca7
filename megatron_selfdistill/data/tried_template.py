# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A chat template is tried in a child process, whose time and memory are limited."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LIMIT_S = 60.0
"""The time for a trial, in seconds, with the import of transformers from a slow file system."""
LIMIT_BYTES = 2 << 30
"""The memory that a trial may take beside the program's own, in bytes; only Linux limits it."""
_OUT_OF_MEMORY = 3


_CHILD = """
import json, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template

template, variables, limit, status = json.load(sys.stdin)
if sys.platform == "linux":
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
try:
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
except MemoryError:
    sys.exit(status)
except Exception:
    pass  # the template may refuse these messages; the run renders its own and reports errors
"""


def try_chat_template(name: str, template: Any, variables: Mapping[str, Any]) -> None:
    """Render a chat template once in a child process of limited memory and time.

    ``name``: the tokenizer of the template, for the message; ``template``: Jinja, other values are not tried;
    ``variables``: the special tokens that the template may write.  A template whose text cannot grow beyond that of the
    messages needs no trial.

    Raises: ValueError if the template exceeds a limit.
    """
    if not isinstance(template, str) or _grows_with_the_messages_only(template):
        return
    texts = {key: value for key, value in variables.items() if isinstance(value, str)}
    if exceeded := _exceeded_limit(template, json.dumps(texts)):
        raise ValueError(
            f"{name}: the chat template {exceeded} for one short message; use another tokenizer, or "
            "give a data.chat_template"
        )


@functools.cache
def _exceeded_limit(template: str, variables: str) -> str | None:
    """Return which limit the template exceeds, or None; ``variables`` are an object of JSON."""
    given = json.dumps([template, json.loads(variables), LIMIT_BYTES, _OUT_OF_MEMORY])
    child = [sys.executable, "-c", _CHILD]
    try:
        status = subprocess.run(child, input=given, text=True, capture_output=True, timeout=LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_S:g} s"
    if status != _OUT_OF_MEMORY and status >= 0:
        return None
    return f"took more than {LIMIT_BYTES >> 30} GiB of memory"


def _grows_with_the_messages_only(template: str) -> bool:
    """Return whether the template writes each message a bounded number of times: it has one level of loops."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        parsed = Environment().parse(template)
    except TemplateSyntaxError:  # extensions of transformers are not known here
        return False
    loops = list(parsed.find_all(nodes.For))
    nested = any(loop is not other and other in loop.find_all(nodes.For) for loop in loops for other in loops)
    bounded = (
        *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem),
        *(nodes.For, nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
        *(nodes.Add, nodes.Concat, nodes.Test, nodes.Slice),
    )
    return (
        not nested
        and all(
            isinstance(node, bounded) or (isinstance(node, nodes.Filter) and node.name in ("trim", "upper", "lower"))
            for node in parsed.find_all(nodes.Node)
        )
        and all(isinstance(loop.iter, nodes.Name) and not loop.recursive for loop in loops)
    )
