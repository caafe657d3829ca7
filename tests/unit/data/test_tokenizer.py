# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A response cut into its tokens' texts is still the response, and a tokenizer that loses or splits text is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import TokenizersBackend

from megatron_selfdistill.data import tried_template
from megatron_selfdistill.data.tokenizer import pieces
from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.data.tried_template import try_chat_template

TEXT = "What is the  sum?\n\n héllo 你好 🙂🙂 the answer<|im_end|> is seven"


@pytest.mark.parametrize("directory", ["chat_directory", "sentencepiece_file"])
def test_the_pieces_joined_are_the_decoded_text(directory, request):
    tokenizer = load_tokenizer(request.getfixturevalue(directory))
    ids = tokenizer.encode(TEXT)
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert "🙂" in found, "the last byte of a character brings the whole character"
    assert "" in found and not any("\ufffd" in piece for piece in found)
    assert any(piece.startswith(" ") for piece in found), "leading spaces stay with their token"
    cut = tokenizer.encode("so 🙂")[:-2]
    assert "".join(pieces(cut, tokenizer)) == tokenizer.decode(cut) and pieces([], tokenizer) == []


def test_bytes_that_are_no_text_are_decoded_a_few_at_a_time(chat_directory, monkeypatch):
    """A model gone wrong writes such responses, and a sample must not hold up the run."""
    tokenizer = load_tokenizer(chat_directory)
    first_byte = tokenizer.encode("🙂")[0]
    longest, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: longest.append(len(ids)) or decode(ids))
    assert set("".join(pieces([first_byte] * 200, tokenizer))) == {"\ufffd"}
    assert max(longest) <= 8


def changed(directory: Path, **changes: Any) -> Path:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def test_a_version_of_transformers_that_loses_spaces_is_refused(chat_directory, tmp_path, monkeypatch):
    directory = changed(shutil.copytree(chat_directory, tmp_path / "llama"), tokenizer_class="LlamaTokenizerFast")
    monkeypatch.setattr(TokenizersBackend, "_tokenizer_json_has_byte_level", lambda *_, **__: False, raising=False)
    with pytest.raises(ValueError, match=r"tokenizer.json"):
        load_tokenizer(directory)
    tokenizer = load_tokenizer(changed(directory, tokenizer_class="PreTrainedTokenizerFast"))
    assert tokenizer.decode(tokenizer.encode("a  b")) == "a  b"


def test_a_tokenizer_of_mistral_with_the_split_of_another_model_is_refused(chat_directory, tmp_path):
    directory = shutil.copytree(chat_directory, tmp_path / "mistral")
    (directory / "config.json").write_text('{"model_type": "mistral3", "transformers_version": "4.50.0"}')
    content = json.loads((file := directory / "tokenizer.json").read_text().replace(r"\\p{N}|", r"\\p{N}{1,3}|"))
    model = content["model"]
    model["merges"] += [["1", "2"]]
    model["vocab"] |= {token: 1000 + i for i, token in enumerate(["12", *map("filler{}".format, range(100_000))])}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"splits text otherwise than Mistral's models"):
        load_tokenizer(directory)
    assert len(load_tokenizer(changed(directory, fix_mistral_regex=True)).encode("12")) == 2
    assert len(load_tokenizer(changed(directory, fix_mistral_regex=False)).encode("12")) == 1


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m['content'] | trim }}{% endfor %}{{ eos_token }}"
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ 'a' * 10**10 }}", id="a product"),
        pytest.param(DOUBLED, id="doubled in a loop", marks=pytest.mark.full),
    ],
)
def test_a_template_that_takes_all_memory_is_refused(template):
    with pytest.raises(ValueError, match=r"^DIR: .* memory .* data.chat_template"):
        try_chat_template("DIR", template, {})


def test_a_template_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(tried_template, "LIMIT_S", 1.5)
    with pytest.raises(ValueError, match=r"^DIR: .* 1.5 s"):
        try_chat_template("DIR", SLOW, {})


def test_templates_that_models_publish_pass():
    published = "{%- macro twice(m) %}{{ m.content * 2 }}{% endmacro %}{{ twice(messages[0]) }}"
    refusing = published + "{{ raise_exception('only tools') }}"
    for template in (refusing, "{{ no syntax", None, {"default": PLAIN}):
        try_chat_template("DIR", template, {"eos_token": "</s>", "additional": ["x"]})


def test_a_template_that_writes_each_message_once_needs_no_trial(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child process"))
    tried_template._exceeded_limit.cache_clear()  # another test may have tried the same templates
    try_chat_template("DIR", PLAIN, {"eos_token": "</s>"})
    nested = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
    loop = "{% for i in range(9) %}x{% endfor %}"
    for template in (nested, DOUBLED, loop, "{{ 2 * 3 }}", "{% set x = 1 %}", "{{ f(1) }}"):
        with pytest.raises(pytest.fail.Exception, match="a child process"):
            try_chat_template("DIR", template, {})
