# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A response ends at the union of what the tokenizer, the files of the model's directory and the run name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from characters import Characters

from megatron_selfdistill.data.end_tokens import end_tokens

PUBLISHED: dict[str, tuple[int, Any, Any, tuple[str, int]]] = {
    "GLM-4.5": (151329, [151329, 151336, 151338], [151329, 151336, 151338], ("<|user|>", 151336)),
    "Phi-3-mini": (32000, [32000, 32001, 32007], 32000, ("<|end|>", 32007)),
    "Kimi-K2": (163585, 163586, 163585, ("<|im_end|>", 163586)),
    "Qwen3.5, with a text part": (248046, None, {"text_config": {"eos_token_id": 248044}}, ("<|im_end|>", 248046)),
}
"""Family -> its tokenizer's end of sequence, the ends in generation_config.json and config.json, the end of a turn."""


class Published(Characters):
    """A tokenizer with the published ids of one family, which has a text for the token at the end of a turn."""

    vocab_size = 300_000

    def __init__(self, eos: int, turn: tuple[str, int], after_next: bool) -> None:
        self.eos_id, self.turn, self.after_next = eos, turn, after_next

    def encode(self, text: str) -> list[int]:
        """Return the code points, and the published id of the end of a turn."""
        first, *others = [Characters.encode(self, part) for part in text.split(self.turn[0])]
        return [*first, *(one for part in others for one in (self.turn[1], *part))]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return a text for each id."""
        return "".join(f"<{one}>" for one in ids)

    def special_tokens(self) -> Sequence[str]:
        """Return the texts of all large ids."""
        return [f"<{one}>" for one in range(32_000, 32_010)] + [f"<{one}>" for one in (*range(128_000, 129_000),)]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Return the messages with the end of the turn after each reply, or only between messages."""
        return self.turn[0].join(message["content"] for message in messages) + self.turn[0] * (not self.after_next)


def model_directory(path: Path, files: Mapping[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    for name in ("generation_config.json", "config.json"):
        value = files.get(name)
        content = value if isinstance(value, dict) else {"eos_token_id": value}
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("after_next", [False, True], ids=["the template ends a turn", "the next turn ends it"])
@pytest.mark.parametrize("family", PUBLISHED)
def test_the_ends_of_published_models_are_those_that_their_files_name(tmp_path, family, after_next):
    eos, *stated, turn = PUBLISHED[family]
    files = dict(zip(("generation_config.json", "config.json"), stated, strict=True))
    found = end_tokens(Published(eos, turn, after_next), [model_directory(tmp_path, files)], [], {})
    listed = [one for value in stated for one in (value if isinstance(value, list) else [value])]
    wanted = {eos, *(one for one in listed if isinstance(one, int)), *([248044] if "part" in family else [])}
    assert set(found.ids) == wanted
    assert found.ids[0] == found.reply_end == turn[1], "the end of a turn goes before the end of a text"
    assert all(f"<{one}>" in found.about for one in wanted)


def test_the_line_names_each_token_with_its_text_and_its_origins(tmp_path):
    stated = model_directory(tmp_path, {"generation_config.json": [36, 35], "config.json": 500})
    found = end_tokens(Characters(), [stated], [33], {})
    assert found.ids == (36, 35, 33) and found.reply_end is None
    assert "'$' (36: tokenizer, generation_config.json), '#' (35: generation_config.json; warning" in found.about
    assert "(500: config.json)" in found.about and "'!' (33: rollout.stop_token_ids)" in found.about


def test_a_directory_without_the_files_adds_nothing_and_a_broken_file_and_no_end_at_all_are_refused(tmp_path):
    assert end_tokens(Characters(), [tmp_path], [], {}).ids == (36,)
    model_directory(tmp_path, {"generation_config.json": True, "config.json": ["37", None]})
    assert end_tokens(Characters(), [tmp_path], [], {}).ids == (36,), "only integers are ids"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: "):
        end_tokens(Characters(), [tmp_path], [], {})
    tokenizer = Published(36, ("$", 36), False)
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match=r"rollout.stop_token_ids"):
        end_tokens(tokenizer, [], [], {})
