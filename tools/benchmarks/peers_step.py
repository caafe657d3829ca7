# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure a whole step of self-distillation, part by part, beside what a user would pick instead.

    python tools/benchmarks/peers_step.py                     a random Llama with the sizes of SmolLM2-135M
    python tools/benchmarks/peers_step.py --hf DIRECTORY --new-tokens 256 --contenders mix TRL transformers

Contenders, with the same float32 weights, prompts, hints and threads, each with the settings that it has by default:

    anchored            this program with the default target, whose reference reads each response, too
    mix                 this program with target.anchor=student, which has no reference, as the others have none
    TRL                 TRL's SDFTTrainer without gradient checkpointing: JSD over the teacher's 100 most likely tokens
    TRL, whole rows     the same with distillation_mode=full_logits and the reverse KL
    transformers        ``generate``, two forward passes padded on the right, KL(p || t) over the whole vocabulary,
                        AdamW of PyTorch

A step samples one response of --new-tokens tokens to each of --batch prompts at temperature 1, without a stop token.
The contenders take turns; a ratio is the median, over the rounds after the first, of the ratio to transformers within
one round.  On a CPU the seconds are those of the processor.  The parts:

    sampling            the responses
    frozen passes       the passes without gradients up to hidden states (this program), or to logits (the others)
    forward and loss    the student's forward pass, the logits that the part above lacks, and the loss
    backward            the backward pass
    optimizer           the norm of the gradient and the optimizer
    rest                what is in none of these: packing, padding, tokenizing, metrics
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from measuring_parser import measuring_parser
from step_parts import Clock, now, timed_parts
from torch.nn.utils.rnn import pad_sequence

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_selfdistill.distributed.terminal import silence_known_warnings  # noqa: E402

PARTS = ("sampling", "frozen passes", "forward and loss", "backward", "optimizer", "rest")
PLAIN = "transformers"
ANCHORS = {"anchored": "reference", "mix": "student"}
"""The contenders that are steps of this program, and their ``target.anchor``."""
TRL: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, whole rows": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
}
"""The contenders that are steps of TRL's trainer, and their settings beside its defaults."""
NAMES = (*ANCHORS, *TRL, PLAIN)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The device of every contender: that of `distributed.ranks.initialize`, and of TRL's trainer."""
OUR_PARTS = {
    "teacher forward": "frozen passes",
    "student forward": "forward and loss",
    "output layer": "forward and loss",
    "loss": "forward and loss",
    "backward": "backward",
}
"""The parts of step_parts.py that are parts of others here."""
LEARNING_RATE = 1e-5
Step = Callable[[Clock], None]


def main() -> None:
    """Run the contenders in turn and print the table."""
    parser = measuring_parser(
        __doc__, {"batch": 16, "prompt": 40, "hint": 16, "new-tokens": 48, "repeats": 3, "threads": 1}
    )
    parser.add_argument("--hf", type=Path, help="directory of a model of Hugging Face; by default a random Llama")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random Llama (default: 30)")
    parser.add_argument(
        "--contenders", nargs="+", choices=NAMES, default=NAMES, help=f"all at a time need much memory; with {PLAIN}"
    )
    arguments = parser.parse_args()
    silence_known_warnings()
    torch.set_num_threads(arguments.threads)
    from megatron_selfdistill.distributed import ranks

    with tempfile.TemporaryDirectory() as scratch:
        hf = arguments.hf or random_llama(Path(scratch) / "hf", arguments.layers)
        contenders = built(hf, Path(scratch), arguments)
        rounds = [timed_round(contenders, repeat) for repeat in range(arguments.repeats + 1)][1:]
        ranks.shutdown()
    print(table(rounds, arguments), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "rounds": rounds}, default=str))


def built(hf: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Step]:
    """Return the steps of ``arguments.contenders`` by name."""
    from transformers import AutoConfig

    vocab_size = AutoConfig.from_pretrained(hf, trust_remote_code=False).vocab_size
    tokens = token_stream(hf, vocab_size, arguments)
    rng, spread = random.Random(0), arguments.prompt // 4
    lengths = [arguments.prompt + rng.randint(-spread, spread) for _ in range(arguments.batch)]
    problems = [(list(islice(tokens, length)), list(islice(tokens, arguments.hint))) for length in lengths]
    chosen, words = [name for name in NAMES if name in arguments.contenders], word_tokenizer(vocab_size)
    anchors = {name: ANCHORS[name] for name in chosen if name in ANCHORS}
    steps = our_steps(hf, scratch / "megatron", problems, vocab_size, arguments.new_tokens, anchors)
    for name in chosen:
        if name in TRL:
            steps[name] = trl_step(hf, scratch, problems, words, arguments.new_tokens, **TRL[name])
    return {**steps, PLAIN: plain_step(hf, problems, arguments.new_tokens)}


def timed_round(contenders: Mapping[str, Step], repeat: int) -> dict[str, dict[str, float]]:
    """Return the seconds of each part of a step of each contender; every other round has the other order."""
    found = {}
    for name in list(contenders)[:: 1 if repeat % 2 else -1]:
        clock, began = Clock(on=True), now()
        contenders[name](clock)
        seconds = {part: clock.seconds.get(part, 0.0) for part in PARTS}
        for inner, part in OUR_PARTS.items():
            if inner != part:
                seconds[part] += clock.seconds.get(inner, 0.0)
        seconds["rest"] = now() - began - sum(seconds.values())
        found[name] = seconds
    return found


Problems = Sequence[tuple[list[int], list[int]]]
"""The tokens of each problem and of its hint; the teacher reads the hint before the problem."""


def our_steps(
    hf: Path, megatron: Path, problems: Problems, vocab_size: int, new_tokens: int, anchors: Mapping[str, str]
) -> dict[str, Step]:
    """Return the steps of this program with these ``anchors`` by name, each on a copy of the weights."""
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.trained_weights import TrainedWeights
    from megatron_selfdistill.config import load
    from megatron_selfdistill.data.contexts import ContextPair
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.interop.conversion import hf_to_megatron
    from megatron_selfdistill.learner import Learner
    from megatron_selfdistill.metrics.step import step_metrics
    from megatron_selfdistill.rollout.base import Request, SamplingParams
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    hf_to_megatron(hf, megatron)
    keys = ["optimizer=fp32", f"optimizer.lr={LEARNING_RATE}", "optimizer.lr_warmup_steps=0", "num_steps=100"]
    grid = None
    steps: dict[str, Step] = {}
    params, requests = (
        SamplingParams(max_new_tokens=new_tokens),
        [Request(problem, seed=i) for i, (problem, _) in enumerate(problems)],
    )
    for name, anchor in anchors.items():
        config = with_stored_architecture(load([*keys, f"checkpoint.load={megatron}", f"target.anchor={anchor}"]))
        grid = grid or ranks.initialize(config.parallel, seed=0)
        data: Any = SimpleNamespace(vocab_size=vocab_size, num_controls=0)
        learner = Learner(config, data, grid, trained=TrainedWeights())
        sampler = MegatronSampler(learner.chunks, grid, vocab_size, 1024)
        sampler.update_weights(0)

        def step(clock: Clock, learner: Learner = learner, sampler: MegatronSampler = sampler) -> None:
            with clock("sampling"):
                responses = sampler.generate(requests, params)
            contexts = [
                ContextPair(str(number), problem, hint + problem, response.token_ids, False)
                for number, ((problem, hint), response) in enumerate(zip(problems, responses, strict=True))
            ]
            packed = learner.pack(contexts)
            with timed_parts(clock), clock("backward"):
                output = learner.forward_backward(packed, measure_every=None)
            step_metrics(output, None, learner.grid)
            with clock("optimizer"):
                learner.apply_gradients(learner.gradient_norm())

        steps[name] = step
    return steps


def word_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer whose token i is the word ``ti``, so that every contender reads the same ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")


def trl_step(hf: Path, scratch: Path, problems: Problems, words: Any, new_tokens: int, **settings: Any) -> Step:
    """Return the step of TRL's trainer for self-distillation; ``settings``: those that differ from its defaults."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    texts = [[" ".join(f"t{token}" for token in part) for part in problem] for problem in problems]
    records = [{"prompt": problem, "privileged_context": hint} for problem, hint in texts]
    arguments = SDFTConfig(
        output_dir=str(scratch / "trl"),
        per_device_train_batch_size=len(problems),
        num_generations=1,
        max_completion_length=new_tokens,
        teacher_prompt_template="{privileged_context} {prompt}",
        temperature=1.0,
        top_k=0,
        generation_kwargs={"min_new_tokens": new_tokens},
        learning_rate=LEARNING_RATE,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, trust_remote_code=False)
    trainer = SDFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(records), processing_class=words)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    parameters = list(trainer.model.parameters())

    def step(clock: Clock) -> None:
        trainer.model.train()
        with timed_trl(trainer, clock):
            trainer.training_step(trainer.model, records, None)
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()

    return step


@contextlib.contextmanager
def timed_trl(trainer: Any, clock: Clock) -> Iterator[None]:
    """Let ``clock`` time the parts of a step of ``trainer`` in this context."""

    def of_model() -> str:
        return "forward and loss" if torch.is_grad_enabled() else "frozen passes"

    parts: list[tuple[Any, str, str | Callable[[], str]]] = [
        (trainer, "_generate", "sampling"),
        (trainer, "_forward_logits", of_model),
        (trainer, "_compute_self_distillation_loss", "forward and loss"),
        (trainer.accelerator, "backward", "backward"),
    ]
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in parts:
            patches.enter_context(mock.patch.object(owner, attribute, clock.timing(name, getattr(owner, attribute))))
        yield


def plain_step(hf: Path, problems: Problems, new_tokens: int) -> Step:
    """Return the step that a user would write with transformers and PyTorch."""
    from transformers import AutoModelForCausalLM

    student, frozen = (
        AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, trust_remote_code=False).to(DEVICE)
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)

    def step(clock: Clock) -> None:
        with clock("sampling"):
            responses = sampled(student.eval(), [problem for problem, _ in problems], new_tokens)
        pairs = list(zip(problems, responses, strict=True))
        with clock("frozen passes"), torch.no_grad():
            log_q = response_logits(frozen, [(hint + problem, response) for (problem, hint), response in pairs])
            log_q = log_q.log_softmax(-1)
        with clock("forward and loss"):
            logits = response_logits(student.train(), [(problem, response) for (problem, _), response in pairs])
            log_p = logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(log_p)
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


@torch.no_grad()
def sampled(model: Any, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Return responses of ``num_tokens`` tokens at temperature 1 by ``generate`` of transformers."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True, padding_side="left")
    lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0, "eos_token_id": None}
    output = model.generate(ids.to(DEVICE), attention_mask=mask.long().to(DEVICE), do_sample=True, top_k=0, **lengths)
    responses: list[list[int]] = output[:, ids.size(1) :].tolist()
    return responses


def table(rounds: Sequence[Mapping[str, Mapping[str, float]]], arguments: argparse.Namespace) -> str:
    """Return the table of the seconds of each part, and of the ratio of the whole step to that of transformers."""
    import transformers
    import trl

    lines = [
        f"{arguments.hf or 'a random Llama'}, float32; {arguments.batch} prompts of about {arguments.prompt} tokens, "
        f"hints of {arguments.hint}, responses of {arguments.new_tokens}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}, threads: {arguments.threads}, rounds: {len(rounds)}",
        "",
        f"| | {' | '.join(PARTS)} | step | to {PLAIN} |",
        f"|---|{'---|' * (len(PARTS) + 2)}",
    ]
    for name in rounds[0]:
        parts = [statistics.median(one[name][part] for one in rounds) for part in PARTS]
        steps = [sum(one[name].values()) for one in rounds]
        ratio = statistics.median(s / sum(one[PLAIN].values()) for s, one in zip(steps, rounds, strict=True))
        cells = [f"{value:.2f}" for value in (*parts, statistics.median(steps), ratio)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def random_llama(hf: Path, num_layers: int) -> Path:
    """Write a Llama with the sizes of SmolLM2-135M and random weights, without a tokenizer; return its directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": num_layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.04)
    LlamaForCausalLM(config).save_pretrained(hf)
    return hf


def token_stream(hf: Path, vocab_size: int, arguments: argparse.Namespace) -> Iterator[int]:
    """Yield the tokens of this repository's English, or random tokens where ``hf`` has no tokenizer."""
    if not (hf / "tokenizer_config.json").exists():
        rng = random.Random(1)
        while True:
            yield rng.randrange(vocab_size)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        yield from tokenizer.encode(page.read_text(encoding="utf-8"), add_special_tokens=False)


def response_logits(model: Any, texts: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Return the logits [R, V] of the response tokens of a batch padded on the right."""
    ids = pad_sequence([torch.tensor(prompt + response) for prompt, response in texts], batch_first=True)
    mask = pad_sequence([torch.ones(len(prompt + response)) for prompt, response in texts], batch_first=True)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    states = [
        row[len(prompt) - 1 : len(prompt + response) - 1] for row, (prompt, response) in zip(hidden, texts, strict=True)
    ]
    logits: torch.Tensor = model.lm_head(torch.cat(states))
    return logits


if __name__ == "__main__":
    main()
