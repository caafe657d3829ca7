# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""docs/conversion.md says of every field of a published model's files what a run does with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import GenerationConfig

from megatron_selfdistill.data.end_tokens import FILES
from megatron_selfdistill.data.thoughts import FORMATS

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIELDS = {  # of the families with a map in interop/hf, as published
    "generation_config.json": (
        "_from_model_config bos_token_id cache_implementation do_sample eos_token_id max_length max_new_tokens min_p "
        "pad_token_id repetition_penalty temperature top_k top_p transformers_version use_cache"
    ),
    "tokenizer_config.json": (
        "add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens auto_map backend "
        "bos_token chat_template clean_up_tokenization_spaces cls_token do_lower_case eos_token errors "
        "extra_special_tokens image_token is_local legacy mask_token max_length model_input_names model_max_length "
        "pad_token padding_side processor_class remove_space response_schema sep_token sp_model_kwargs "
        "spaces_between_special_tokens split_special_tokens tokenizer_class truncation_side unk_token "
        "use_default_system_prompt"
    ),
    "chat_template.jinja": (
        "messages tools add_generation_prompt strftime_now enable_thinking thinking reasoning_effort date_string "
        "documents builtin_tools model_identity"
    ),
}


def rows_of(file: str) -> str:
    """Return the rows of the table about ``file``."""
    text = (DOCS / "conversion.md").read_text()
    found, of_file = [], ""
    for line in re.findall(r"^\|.*\|$", text.partition("## What a run reads of these files")[2], re.M):
        name, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        of_file = name or of_file
        found += [" | ".join(cells)] if file in of_file else []
    return "\n".join(found)


@pytest.mark.parametrize("file", FIELDS)
def test_every_field_that_published_models_have_is_in_the_table(file):
    rows = rows_of(file)
    assert [name for name in FIELDS[file].split() if f"`{name}`" not in rows] == []


def test_the_files_that_name_ends_are_those_of_the_table_and_their_field_is_read():
    for file in FILES:
        assert re.search(r"`eos_token_id`[^|]*\| Read", rows_of(file)), file
    assert "special_tokens_map.json" in (DOCS / "conversion.md").read_text()


def test_the_fields_are_those_that_transformers_knows():
    known = GenerationConfig().__dict__.keys() | {"cache_implementation", "transformers_version"}
    assert [name for name in FIELDS["generation_config.json"].split() if name not in known] == []


def test_the_table_of_thoughts_is_the_one_of_the_code():
    rows = (DOCS / "evaluation.md").read_text().partition("### Thoughts")[2].partition("## ")[0].replace("\\", "")
    for families, begin, end in FORMATS:
        if "," in families and families.startswith("gpt-oss"):
            continue  # a form of data, not of a family
        for family in re.split(r", | and ", families):
            assert family in rows, family
        for mark in (begin, end) if families != "gpt-oss" else ():
            assert f"`{mark.replace(chr(92), '').removesuffix('n?')}`" in rows, mark
