# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the sampler in process and a training step on a CPU, against transformers and plain PyTorch.

    python tools/benchmarks/cpu_sampler.py                    a random Llama with the sizes of SmolLM2-135M
    python tools/benchmarks/cpu_sampler.py --hf DIRECTORY     a model of Hugging Face with its tokenizer

Both contenders have the same float32 weights, threads and work, and take turns; a ratio is the median, over the rounds,
of the ratio of the processor's seconds within one round, which depend less on other work than wall seconds.  With more
than one thread, other work on the machine lets threads wait for each other, which also takes processor time.

    sampling    greedy responses without a stop token to prompts of unequal lengths: `MegatronSampler` against
                ``generate`` of transformers, which pads the prompts on the left.  A sequence where the two differ
                would show here, since both must choose the same tokens.
    training    one step of the default method on these responses, from packing to the optimizer, with the metrics of
                the step: the stages of the trainer against forward and backward of the student, forwards of teacher and
                reference without gradients, the loss, clipping and AdamW in plain PyTorch.  The plain step has one
                batch padded on the right, computes logits at response positions only, and solves for no k: its target
                is the cheapest of the family, q = softmax((w t + r) / (1 + w)).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring_parser import measuring_parser
from step_parts import now
from torch.nn.utils.rnn import pad_sequence

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_selfdistill.distributed.terminal import silence_known_warnings  # noqa: E402


def main() -> None:
    """Run the contenders in turn and print the table."""
    parser = measuring_parser(
        __doc__,
        {"batch": 32, "trained": 16, "prompt": 40, "hint": 16, "new-tokens": 72, "repeats": 5, "threads": 1},
    )
    parser.add_argument("--hf", type=Path, help="directory of a model of Hugging Face; by default a random Llama")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random Llama (default: 30)")
    arguments = parser.parse_args()
    silence_known_warnings()
    torch.set_num_threads(arguments.threads)
    from megatron_selfdistill.distributed import ranks

    with tempfile.TemporaryDirectory() as scratch:
        hf = arguments.hf or random_llama(Path(scratch) / "hf", arguments.layers)
        bench = Bench.build(hf, Path(scratch) / "megatron", arguments)
    sampling, equal, responses = bench.sampling()
    training = bench.training(responses)
    ranks.shutdown()
    found = {"sampling": sampling, "training": training}
    print(table(found, equal, arguments), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "seconds": found}, default=str))


def random_llama(hf: Path, num_layers: int) -> Path:
    """Write a Llama with the sizes of SmolLM2-135M and random weights, without a tokenizer; return its directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": num_layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.04)
    LlamaForCausalLM(config).save_pretrained(hf)
    return hf


@dataclass
class Bench:
    """The same model twice, as the parts of this program and as models of transformers, with prompts for both."""

    learner: Any
    sampler: Any
    student: Any
    frozen: Any
    prompts: list[list[int]]
    hints: list[list[int]]
    arguments: argparse.Namespace

    @classmethod
    def build(cls, hf: Path, megatron: Path, arguments: argparse.Namespace) -> Bench:
        """Load the weights of ``hf`` for both contenders; ``megatron``: a directory for the converted checkpoint."""
        from transformers import AutoConfig, AutoModelForCausalLM

        from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
        from megatron_selfdistill.checkpoint.trained_weights import TrainedWeights
        from megatron_selfdistill.config import load
        from megatron_selfdistill.distributed import ranks
        from megatron_selfdistill.interop.conversion import hf_to_megatron
        from megatron_selfdistill.learner import Learner
        from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

        hf_to_megatron(hf, megatron)
        keys = ["optimizer=fp32", "optimizer.lr=1e-5", "optimizer.lr_warmup_steps=0", f"checkpoint.load={megatron}"]
        config = with_stored_architecture(load([*keys, "num_steps=100", "schedule.max_tokens=2048"]))
        vocab_size = AutoConfig.from_pretrained(hf, trust_remote_code=False).vocab_size
        grid = ranks.initialize(config.parallel, seed=0)
        data: Any = SimpleNamespace(vocab_size=vocab_size, num_controls=0)
        learner = Learner(config, data, grid, trained=TrainedWeights())
        student, frozen = (
            AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, trust_remote_code=False) for _ in range(2)
        )
        sampler = MegatronSampler(learner.chunks, grid, vocab_size, 1024)
        sampler.update_weights(0)
        tokens = token_stream(hf, vocab_size, arguments)
        rng, spread = random.Random(0), arguments.prompt // 4
        lengths = [arguments.prompt + rng.randint(-spread, spread) for _ in range(arguments.batch)]
        prompts = [list(islice(tokens, length)) for length in lengths]
        hints = [list(islice(tokens, arguments.hint)) for _ in lengths]
        return cls(learner, sampler, student, frozen.eval(), prompts, hints, arguments)

    def sampling(self) -> tuple[list[dict[str, float]], int, list[list[int]]]:
        """Return the seconds of each round, how many responses are equal, and the responses."""
        from megatron_selfdistill.rollout.base import Request, SamplingParams

        params = SamplingParams(max_new_tokens=self.arguments.new_tokens, temperature=0)
        requests = [Request(prompt, seed=0) for prompt in self.prompts]
        ours: list[list[int]] = []
        theirs: list[list[int]] = []

        def sample() -> None:
            ours[:] = [response.token_ids for response in self.sampler.generate(requests, params)]

        def generate() -> None:
            theirs[:] = generated(self.student.eval(), self.prompts, params.max_new_tokens)

        rounds = self._in_turn({"ours": sample, "theirs": generate})
        return rounds, sum(a == b for a, b in zip(ours, theirs, strict=True)), ours

    def training(self, responses: Sequence[list[int]]) -> list[dict[str, float]]:
        """Return the seconds of each round of a step on the first responses."""
        from megatron_selfdistill.data.contexts import ContextPair
        from megatron_selfdistill.metrics.step import step_metrics

        contexts = [
            ContextPair(str(number), prompt, hint + prompt, response, False)
            for number, (prompt, hint, response) in enumerate(zip(self.prompts, self.hints, responses, strict=True))
        ][: self.arguments.trained]
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)

        def step() -> None:
            output = self.learner.forward_backward(self.learner.pack(contexts), measure_every=None)
            step_metrics(output, None, self.learner.grid)
            self.learner.apply_gradients(self.learner.gradient_norm())

        def plain() -> None:
            optimizer.zero_grad()
            plain_loss(self.student.train(), self.frozen, contexts, self.learner.target.teacher_weight).backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()

        return self._in_turn({"ours": step, "theirs": plain})

    def _in_turn(self, contenders: dict[str, Callable[[], None]]) -> list[dict[str, float]]:
        """Return the seconds of each contender in each round after the first, which warms up."""
        rounds = []
        for repeat in range(self.arguments.repeats + 1):
            names = list(contenders)[:: 1 if repeat % 2 else -1]
            rounds.append({name: _seconds(contenders[name]) for name in names})
        return rounds[1:]


def _seconds(work: Callable[[], None]) -> float:
    began = now()
    work()
    return now() - began


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


@torch.no_grad()
def generated(model: Any, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Return greedy responses of ``num_tokens`` tokens by ``generate`` of transformers."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True, padding_side="left")
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=mask.long(), eos_token_id=None, **options)
    responses: list[list[int]] = output[:, ids.size(1) :].tolist()
    return responses


def plain_loss(student: Any, frozen: Any, contexts: Sequence[Any], weight: float) -> torch.Tensor:
    """Return the mean over response tokens of KL(p || q), q = softmax((w t + r) / (1 + w)), in plain PyTorch."""
    of_student = [(context.student_prompt, context.response) for context in contexts]
    with torch.no_grad():
        teacher = response_logits(frozen, [(context.teacher_prompt, context.response) for context in contexts])
        reference = response_logits(frozen, of_student)
        log_q = ((weight * teacher + reference) / (1 + weight)).log_softmax(-1)
    log_p = response_logits(student, of_student).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(log_p)


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


def table(found: dict[str, list[dict[str, float]]], equal: int, arguments: argparse.Namespace) -> str:
    """Return the table of both measurements."""

    def median(rounds: list[dict[str, float]], value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(one) for one in rounds)

    sampling, training = found["sampling"], found["training"]
    num_tokens = arguments.batch * arguments.new_tokens
    speeds = [num_tokens / median(sampling, lambda one, name=name: one[name]) for name in ("ours", "theirs")]  # type: ignore[misc]
    steps = [median(training, lambda one, name=name: one[name]) for name in ("ours", "theirs")]  # type: ignore[misc]
    return "\n".join(
        [
            f"{arguments.hf or 'a random Llama'}, float32; {arguments.batch} prompts of about {arguments.prompt}, "
            f"{arguments.new_tokens} new tokens, equal responses: {equal} of {arguments.batch}; {arguments.trained} "
            f"responses per step, hints of {arguments.hint}; torch {torch.__version__}, threads: {arguments.threads}",
            "",
            "| | this program | transformers, PyTorch | ratio |",
            "|---|---|---|---|",
            f"| sampling, tokens/s | {speeds[0]:.0f} | {speeds[1]:.0f} | "
            f"{median(sampling, lambda one: one['theirs'] / one['ours']):.2f} |",
            f"| training step, s | {steps[0]:.2f} | {steps[1]:.2f} | "
            f"{median(training, lambda one: one['ours'] / one['theirs']):.2f} |",
        ]
    )


if __name__ == "__main__":
    main()
