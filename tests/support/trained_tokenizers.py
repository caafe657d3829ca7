# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Real tokenizers that the tests train: a byte-level BPE chat model, a character-level base model, SentencePiece."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CORPUS = [
    "What is the sum of three and four? The answer is seven.",
    "user assistant system solution problem hint reason in your own words step by step",
    "Use it only as a hint. Never mention that a solution was given. \\boxed{42} {x} {{y}}",
    "first add the units, then the tens, then the hundreds: 500-408 = 092",
]


@pytest.fixture(autouse=True)
def untried_templates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the chat templates of the tests without a trial in a child process, which test_tokenizer.py tests."""
    if request.path.name != "test_tokenizer.py":
        monkeypatch.setattr("megatron_selfdistill.data.tried_template._exceeded_limit", lambda *_: None)


@pytest.fixture(scope="session")
def chat_template() -> str:
    """Roles between special tokens; the generation prompt ends in ``<think>`` unless that is switched off."""
    return CHAT_TEMPLATE


@pytest.fixture(scope="session")
def plain_template() -> str:
    return PLAIN_TEMPLATE


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face directory: byte-level BPE, roles, and a generation prompt that ends in ``<think>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), behavior="isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*CORPUS, "really?\n\n", "truly.\n\n"] * 20, trainer)
    # Many real tokenizers add a first token unless a flag forbids it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHAT_TEMPLATE
    directory = tmp_path_factory.mktemp("chat")
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def character_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face directory without chat template: one token per character, ``$`` ends a text."""
    vocabulary = {character: i for i, character in enumerate("0123456789-=b.,;:|H$_")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    directory = tmp_path_factory.mktemp("characters")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token="_", unk_token="_")
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SentencePiece ``tokenizer.model``: BPE with byte fallback, ``<s>`` and ``</s>``, and chat pieces."""
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 360, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"user_defined_symbols": ["<|im_start|>", "<|im_end|>", "<think>"], "minloglevel": 2}
    texts = {"sentence_iterator": iter(CORPUS * 10), "model_writer": model}
    sentencepiece.SentencePieceTrainer.train(**texts, **options, remove_extra_whitespaces=False)
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file
