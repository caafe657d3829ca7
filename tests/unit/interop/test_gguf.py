# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A GGUF file becomes a Hugging Face directory with its numbers, tokenizer and end tokens, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import hf_models
import models
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFValueType
from hf_contents import config_of, tensors_of
from layout_logits import logits_through_the_pipeline
from torch import Tensor

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.convert_command import main
from megatron_selfdistill.interop.gguf import gguf_to_hf

NUM_LAYERS, HIDDEN, HEADS, GROUPS, CHANNELS, WIDTH = 2, 64, 4, 2, 16, 96
ROPE_BASE, EPSILON = 5000.0, 1e-3
BLOCK = 32
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
TEXT = [7, 100, 33, 250, 256, 259, 31, 31, 8, 90, 261, 12]

# Byte-level tokens: the 256 bytes as GPT-2 spells them, four merges, and three tokens that no text contains.
_SHOWN = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SPELT = dict(zip(_SHOWN + sorted(set(range(256)) - set(_SHOWN)), map(chr, [*_SHOWN, *range(256, 324)]), strict=True))
BYTES = [_SPELT[byte] for byte in range(256)]
SPACE, NEWLINE = BYTES[ord(" ")], BYTES[ord("\n")]
MERGES = [f"{SPACE} {SPACE}", f"{NEWLINE} {NEWLINE}", "1 2", "t h"]
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "<|pad|>", "<|user|>", "<|end|>"]
PAD, USER, END = range(260, 263)
ID = {token: index for index, token in enumerate(TOKENS)}

Changes = Callable[[dict[str, Any], dict[str, Any]], None]


class Stored:
    """A tensor as a file stores it, and the numbers that it stands for."""

    def __init__(self, kind: GGMLQuantizationType, data: np.ndarray, numbers: np.ndarray) -> None:
        self.kind, self.data, self.numbers = kind, data, numbers


def stored(kind: str, shape: tuple[int, ...], random: np.random.Generator, size: float) -> Stored:
    """Return a random tensor: the codes of its blocks are drawn, and its numbers follow from the format's formula."""
    where = GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        data = (size * random.standard_normal(shape)).astype(np.float32 if kind == "F32" else np.float16)
        return Stored(where, data, data.astype(np.float64))
    blocks = (*shape[:-1], shape[-1] // BLOCK)
    scale = (size / (8 if kind == "Q4_1" else 100) * random.uniform(0.5, 1.5, blocks)).astype(np.float16)
    if kind == "Q8_0":  # one f16 scale, 32 signed bytes: scale * code
        codes = random.integers(-127, 128, (*blocks, BLOCK), dtype=np.int8)
        data = np.concatenate([scale[..., None].view(np.uint8), codes.view(np.uint8)], axis=-1)
        numbers = scale[..., None].astype(np.float64) * codes
    else:  # one f16 scale, one f16 least number, 16 bytes with codes i (low half) and i + 16: scale * code + least
        least = (-8 * scale.astype(np.float64) * random.uniform(0.8, 1.2, blocks)).astype(np.float16)
        codes = random.integers(0, 16, (*blocks, BLOCK), dtype=np.uint8)
        packed = codes[..., :16] | codes[..., 16:] << 4
        heads = [part[..., None].view(np.uint8) for part in (scale, least)]
        data = np.concatenate([*heads, packed], axis=-1)
        numbers = scale[..., None].astype(np.float64) * codes + least[..., None]
    return Stored(where, data.reshape(*shape[:-1], -1), numbers.reshape(shape))


def tiny_tensors() -> dict[str, Stored]:
    random = np.random.default_rng(0)

    def matrix(kind: str, rows: int, columns: int) -> Stored:
        return stored(kind, (rows, columns), random, 1.5 * columns**-0.5)

    def norm() -> Stored:
        data = (1 + 0.3 * random.standard_normal(HIDDEN)).astype(np.float32)
        return Stored(GGMLQuantizationType.F32, data, data.astype(np.float64))

    tensors = {"token_embd.weight": stored("Q8_0", (len(TOKENS), HIDDEN), random, 0.6), "output_norm.weight": norm()}
    for layer in range(NUM_LAYERS):
        tensors |= {
            f"blk.{layer}.{name}.weight": made
            for name, made in {
                "attn_norm": norm(),
                "attn_q": matrix("Q4_1", HEADS * CHANNELS, HIDDEN),
                "attn_k": matrix("Q8_0", GROUPS * CHANNELS, HIDDEN),
                "attn_v": matrix("F16", GROUPS * CHANNELS, HIDDEN),
                "attn_output": matrix("Q4_1", HIDDEN, HEADS * CHANNELS),
                "ffn_norm": norm(),
                "ffn_gate": matrix("Q8_0", WIDTH, HIDDEN),
                "ffn_up": matrix("Q4_1", WIDTH, HIDDEN),
                "ffn_down": matrix("F32", HIDDEN, WIDTH),
            }.items()
        }
    return tensors


def tiny_settings() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": NUM_LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": GROUPS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.rope.dimension_count": CHANNELS,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * PAD + [3] * (len(TOKENS) - PAD),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


def write(file: Path, change: Changes = lambda settings, tensors: None) -> Path:
    """Write the tiny model, after ``change`` has edited its settings and its tensors."""
    settings, tensors = tiny_settings(), tiny_tensors()
    change(settings, tensors)
    writer = gguf.GGUFWriter(file, settings.pop("general.architecture"))
    for key, value in settings.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, _TYPES[type(value)])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(file) -> Path:
    out = file.parent / "tiny"
    assert main(["gguf-to-hf", "--gguf", str(file), "--out", str(out)]) == 0
    return out


def in_halves(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Return q or k for RoPE on the channels (i, i + half) from the rows for channels (2 i, 2 i + 1) of llama.cpp."""
    rows = np.empty_like(numbers)
    for head in range(heads):
        for i in range(CHANNELS // 2):
            for part in range(2):
                start = head * CHANNELS
                rows[start + part * CHANNELS // 2 + i] = numbers[start + 2 * i + part]
    return rows


def test_every_number_is_the_one_that_its_block_stands_for(converted):
    expected = {}
    for name, tensor in tiny_tensors().items():
        numbers = tensor.numbers
        for part, heads in (("attn_q", HEADS), ("attn_k", GROUPS)):
            numbers = in_halves(numbers, heads) if part in name else numbers
        names = {
            "token_embd": "embed_tokens",
            "output_norm": "norm",
            "blk": "layers",
            "ffn_norm": "post_attention_layernorm",
        }
        names |= {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj"}
        names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
        names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        expected["model." + ".".join(names.get(word, word) for word in name.split("."))] = numbers
    found = tensors_of(converted)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name].dtype == torch.float32
        # A product and a sum in float32: each rounds by 2**-24 of numbers that are at most twice the largest.
        bound = 2.0**-22 * np.abs(numbers).max()
        torch.testing.assert_close(found[name].double(), torch.from_numpy(numbers), atol=bound, rtol=0, msg=name)


def reference_logits(tokens: Sequence[int]) -> Tensor:
    """Return the logits in float64 of the numbers in the file, with llama.cpp's RoPE on neighbouring channels."""
    weights = {name.removesuffix(".weight"): torch.from_numpy(one.numbers) for name, one in tiny_tensors().items()}

    def normed(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weights[name]

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(len(tokens), dtype=torch.float64)[:, None, None] * (
            ROPE_BASE ** (-torch.arange(0, CHANNELS, 2, dtype=torch.float64) / CHANNELS)
        )
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, dim=-1).flatten(-2)

    x = weights["token_embd"][torch.tensor(tokens)]
    later = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(NUM_LAYERS):
        own = f"blk.{layer}."
        y = normed(x, own + "attn_norm")
        q, k, v = ((y @ weights[f"{own}attn_{part}"].T).unflatten(-1, (-1, CHANNELS)) for part in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (k, v))
        scores = torch.einsum("shc,thc->hst", q, k) / CHANNELS**0.5
        mixed = torch.einsum("hst,thc->shc", scores.masked_fill(later, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ weights[own + "attn_output"].T
        y = normed(x, own + "ffn_norm")
        gate = torch.nn.functional.silu(y @ weights[own + "ffn_gate"].T)
        x = x + (gate * (y @ weights[own + "ffn_up"].T)) @ weights[own + "ffn_down"].T
    return normed(x, "output_norm") @ weights["token_embd"].T


def megatron_logits(megatron: Path, hf: Path) -> Tensor | None:
    from megatron_selfdistill.checkpoint.external import load_weights

    _, model, _, _ = hf_models.read(hf)
    chunks, grid = models.build(model, ParallelConfig(), seed=9)
    load_weights(megatron, chunks, model.vocab_size)
    return logits_through_the_pipeline(chunks, grid, [TEXT], len(TOKENS))


def test_the_logits_are_those_of_the_file_here_and_in_transformers(ranks, file, converted, tmp_path):
    assert main(["hf-to-megatron", "--hf", str(converted), "--out", str(tmp_path / "megatron")]) == 0
    [ours] = ranks.run(megatron_logits, tmp_path / "megatron", converted, world_size=1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    from_directory = hf_models.hf_logits(load(converted, dtype=torch.float32), [TEXT])
    from_file = hf_models.hf_logits(load(file.parent, gguf_file=file.name, dtype=torch.float32), [TEXT])
    expected = reference_logits(TEXT)
    assert expected.std() > 0.5
    for logits in (ours, from_directory, from_file):
        assert (logits.double() - expected).abs().max() < 1e-4


def test_config_and_end_tokens_come_from_the_file(converted):
    config = config_of(converted)
    sizes = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size".split()
    assert [config[name] for name in sizes] == [NUM_LAYERS, HIDDEN, HEADS, GROUPS, CHANNELS, WIDTH]
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], True)
    assert (config["rope_parameters"]["rope_theta"], config["rms_norm_eps"]) == (ROPE_BASE, pytest.approx(EPSILON))
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, END, PAD)
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & config.keys()
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (END, PAD)


def test_the_end_of_a_turn_ends_a_response_too(tmp_path):
    file = write(tmp_path / "a.gguf", lambda settings, _: settings.update({"tokenizer.ggml.eot_token_id": USER}))
    gguf_to_hf(file, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [USER, END]


@pytest.mark.parametrize(
    "rule, pieces",
    {
        "smollm": ["x", SPACE * 2, "1", "2", NEWLINE * 2, "1", "th"],
        "gpt-2": ["x", SPACE, SPACE, "12", NEWLINE, NEWLINE, "1", "th"],
        "llama-bpe": ["x", SPACE, SPACE, "12", NEWLINE * 2, "1", "th"],
    }.items(),
)
def test_the_tokenizer_cuts_text_by_the_rule_of_the_file(tmp_path, rule, pieces):
    file = write(tmp_path / "a.gguf", lambda settings, _: settings.update({"tokenizer.ggml.pre": rule}))
    gguf_to_hf(file, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("x  12\n\n1th")["input_ids"] == [ID[piece] for piece in pieces]
    assert tokenizer("1<|end|>1")["input_ids"] == [ID["1"], END, ID["1"]]
    assert tokenizer.decode(tokenizer("Grüße,  12\n")["input_ids"]) == "Grüße,  12\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (END, PAD, None)
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "th"}])
    assert list(shown["input_ids"]) == [USER, ID["th"], END]


def test_an_own_output_layer_stays_apart_and_bf16_rounds_once(converted, tmp_path):
    own = stored("F32", (len(TOKENS), HIDDEN), np.random.default_rng(5), 0.1)
    file = write(tmp_path / "a.gguf", lambda _, tensors: tensors.update({"output.weight": own}))
    assert main(["gguf-to-hf", "--gguf", str(file), "--out", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    expected = {**tensors_of(converted), "lm_head.weight": torch.from_numpy(own.data)}
    found = tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
    config = config_of(tmp_path / "out")
    assert (config["tie_word_embeddings"], config["dtype"]) == (False, "bfloat16")


def test_files_beside_the_gguf_file_are_neither_read_nor_run(file, converted, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "a.gguf").write_bytes(file.read_bytes())
    (beside / "evil.py").write_text(f"open({str(tmp_path / 'has_run')!r}, 'w')")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("config.json", "tokenizer_config.json"):
        (beside / name).write_text(json.dumps({"auto_map": auto_map, "model_type": "llama"}))
    (beside / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    gguf_to_hf(beside / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "has_run").exists()
    for written in converted.iterdir():
        assert (tmp_path / "out" / written.name).read_bytes() == written.read_bytes(), written.name


def bias(size: int) -> Stored:
    return stored("F32", (size,), np.random.default_rng(1), 1.0)


def renamed(settings: dict[str, Any], architecture: str) -> None:
    for key in list(settings):
        settings[key.replace("llama.", f"{architecture}.")] = settings.pop(key)
    settings["general.architecture"] = architecture


REFUSED: dict[str, tuple[Changes, str]] = {
    "a model that does not convert": (lambda settings, _: renamed(settings, "gemma3"), "gemma3"),
    "a rule of text that transformers lacks": (
        lambda settings, _: settings.update({"tokenizer.ggml.pre": "deepseek-llm"}),
        "does not know how its tokenizer cuts text: .*'deepseek-llm'",
    ),
    "a stretched RoPE": (
        lambda settings, _: settings.update({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        r"leaves out settings .*rope.scaling.type, rope.scaling.factor",
    ),
    "a tensor that transformers ignores": (
        lambda _, tensors: tensors.update({"rope_freqs.weight": bias(CHANNELS // 2)}),
        "transformers reads .* numbers, the file has",
    ),
    "a missing layer": (
        lambda _, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blk.1.")],
        "none for model.layers.1.input_layernorm.weight, .* and 5 more",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, change, message):
    file = write(tmp_path / "a.gguf", change)
    with pytest.raises(CheckpointError, match=message):
        gguf_to_hf(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


@pytest.mark.parametrize("kept", [4, 1000, -20_000])
def test_a_file_that_is_cut_off_is_refused(file, tmp_path, kept):
    (tmp_path / "a.gguf").write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"a.gguf cannot be converted"):
        gguf_to_hf(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
