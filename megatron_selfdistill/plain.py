# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The default method in one file, from the problems to the update of the weights, without any option.

A model answers problems.  Frozen weights of the start of the run read each answer twice: as the *reference* after the
prompt that the model saw, and as the *teacher* after a prompt that also shows the solution.  The model, the *student*,
is trained towards a target between the two, at every token of its own answer:

    s, r, t          the logits of a response token under student, reference and teacher
    m = w t + r      the mix, w = 0.75
    q = softmax(m / k)
    k : H(q) = H(softmax(r)), at most 1 + w          one k per token; H is the entropy in nats

    loss = mean over the response tokens of KL(p || q) = sum_v p_v (log p_v - log q_v),   p = softmax(s)

The reference is the *anchor*.  The teacher has seen the solution, and alone it would move probability to tokens that
only somebody who knows the solution would write.  In the mix, the teacher changes what the reference considers: a token
that is impossible for the reference stays impossible.  The mix of two distributions is sharper than each of them where
they agree; k gives it the entropy of the reference back, so that the student does not become surer with every step.
Under the bound 1 + w, k never makes the target flatter than the geometric mean of both.  q is a constant: no gradient
flows through it, nor through its samples.  There is no reward and no verifier.

Where all solutions are one text, such as an instruction, they tell nothing about a single problem that could leak.  The
anchor is then the student itself, s in place of r, so that what it learns in one step it considers in the next.

A step:

1. `train` takes the next problems, in an order that is shuffled anew in every epoch.
2. `sample` writes one response to each with the weights that are being trained.
3. `response_logits` reads the responses after both prompts: with the student, whose pass keeps what its gradient needs,
   and twice with the start.
4. `target_log_probs` solves for k by bisection, and `reverse_kl` compares the student with the target.
5. The gradients of all data-parallel ranks are added, clipped by their common norm, and Adam updates the weights.

    make quickstart                                        # trains a base model, and prepares problems
    python -m megatron_selfdistill.plain                   # its task
    torchrun --nproc-per-node 2 -m megatron_selfdistill.plain
    python -m megatron_selfdistill.plain CHECKPOINT TOKENIZER PROBLEMS [HELD_OUT]

The package does the same in every layout of Megatron Core: ten steps of this file give the losses and the first
gradient of ``selfdistill train`` (tests/runs/test_plain.py).  The rest of the package answers what is different there:

- the vocabulary is cut over ranks (loss/sharded), the layers over stages and the tokens over ranks (pipeline/);
- sampling keeps keys and values (rollout/megatron), or leaves the process (engines/vllm);
- the run saves, resumes, evaluates, and stops where it goes wrong (trainer.py);
- another method takes the place of steps 1 to 4 (methods/).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_selfdistill.checkpoint.external import load_weights
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.terminal import silence_known_warnings
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.rollout.sampling import sample_seed, sample_uniforms

TEACHER_WEIGHT = 0.75
"""w: the weight of the teacher's logits in the mix; the reference has the weight 1."""
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Numbers:
    """The sizes of a run; the values are those of the quickstart."""

    num_steps: int = 150
    global_batch_size: int = 32
    """Problems of a step, over all ranks."""
    max_new_tokens: int = 26
    """Tokens of a response at most."""
    max_tokens: int = 2048
    """Tokens of the responses with their prompts that a forward pass reads at most; one of them may have more."""
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    """Steps in which the learning rate grows to ``learning_rate``, by the same amount each."""
    seed: int = 5
    teacher_template: str = "{problem}H{solution}|"
    """The teacher's wording of a problem; the student reads the problem alone."""


class PreparedProblem(NamedTuple):
    """One problem, with its solution as a hint, and both prompts as token ids."""

    id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    solution: str
    answer: str


class Model(NamedTuple):
    """A model on one rank, and the number of token ids, behind which its logits are padding."""

    gpt: GPTModel
    vocab_size: int


# -- reading --------------------------------------------------------------------------------------------------------


def load_model(checkpoint: Path, vocab_size: int, grid: RankGrid) -> Model:
    """Return the model of a Megatron checkpoint with its weights, in float32 and without dropout.  Collective."""
    args = stored_args(checkpoint)
    if args is None:
        raise SystemExit(f"{checkpoint} stores no architecture: expected a checkpoint with Megatron's args")
    architecture = architecture_from_args(args)
    config = transformer_config(architecture, ParallelConfig(), OptimizerConfig(precision="fp32"), ScheduleConfig())
    config.gradient_accumulation_fusion = False  # gradients are in `grad`, not in the buffers of Megatron's DDP
    (gpt,) = build_chunks(architecture, config, grid, vocab_size)
    load_weights(checkpoint, [gpt], vocab_size)
    return Model(gpt, vocab_size)


def read_problems(path: Path, tokenizer: Any, teacher_template: str) -> list[PreparedProblem]:
    """Return the problems of a JSONL file, whose records have id, problem, solution and answer."""

    def prompt(text: str) -> list[int]:
        conversation = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    problems = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        hinted = teacher_template.format(problem=record["problem"], solution=record["solution"])
        prompts = prompt(record["problem"]), prompt(hinted)
        problems.append(PreparedProblem(record["id"], *prompts, record["solution"], record["answer"]))
    return problems


def batches(problems: Sequence[PreparedProblem], batch_size: int, seed: int) -> Iterator[list[PreparedProblem]]:
    """Yield global batches without end; each epoch has an order of its own, and a batch may belong to two epochs."""
    epoch, waiting = 0, list[PreparedProblem]()
    while True:
        while len(waiting) < batch_size:
            order = list(problems)
            random.Random(f"{seed}/{epoch}").shuffle(order)
            epoch, waiting = epoch + 1, waiting + order
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


# -- the model ------------------------------------------------------------------------------------------------------


def next_token_logits(model: Model, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits ``[sum of lengths, vocab_size]`` behind every token of the sequences, in one forward pass.

    The sequences are packed: they lie behind each other in one row, and attention stays within each of them.
    """
    device = next(model.gpt.parameters()).device
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device, torch.int32)
    longest = int(lengths.max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    tokens = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    positions = torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences])
    logits: Tensor = model.gpt(tokens[None], positions[None], attention_mask=None, packed_seq_params=packed)
    return logits[0, :, : model.vocab_size]


def response_logits(model: Model, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
    """Return the logits ``[R, vocab_size]`` from which the R tokens of the responses follow, response by response.

    The logits behind the last token of a prompt predict the first token of the response.
    """
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    rows, begin = [], 0
    for sequence, response in zip(sequences, responses, strict=True):
        end = begin + len(sequence) - 1
        rows.append(torch.arange(end - len(response), end))
        begin = end + 1
    logits = next_token_logits(model, sequences)
    return logits[torch.cat(rows).to(logits.device)]


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    numbers: Numbers,
    end: int,
    *,
    greedy: bool = False,
) -> list[list[int]]:
    """Return one response to each prompt, with its end token where it has one.

    A token is the first one up to which the probabilities add up to more than a uniform number, so that a response
    depends on its seed alone.  Every pass reads all tokens again.
    """
    uniforms = [torch.from_numpy(sample_uniforms(seed, numbers.max_new_tokens)) for seed in seeds]
    responses: list[list[int]] = [[] for _ in prompts]
    for place in range(numbers.max_new_tokens):
        unfinished = [i for i, response in enumerate(responses) if response[-1:] != [end]]
        for several in _within(unfinished, [len(prompts[i]) + place for i in unfinished], numbers.max_tokens):
            sequences = [prompts[i] + responses[i] for i in several]
            ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0)
            logits = next_token_logits(model, sequences).cpu()[ends - 1].double()
            if greedy:
                tokens = logits.argmax(-1)
            else:
                cdf = logits.softmax(-1).cumsum(-1)
                wanted = torch.stack([uniforms[i][place] for i in several])[:, None] * cdf[:, -1:]
                tokens = torch.searchsorted(cdf, wanted, right=True)[:, 0]
            for i, token in zip(several, tokens.tolist(), strict=True):
                responses[i].append(token)
    return responses


def _within(items: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the items in order, in groups whose lengths sum to at most ``max_tokens``, or of one item."""
    group, total = list[int](), 0
    for item, length in zip(items, lengths, strict=True):
        if group and total + length > max_tokens:
            yield group
            group, total = [], 0
        group.append(item)
        total += length
    if group:
        yield group


# -- the target and the loss ----------------------------------------------------------------------------------------


def entropy(log_probs: Tensor) -> Tensor:
    """Return the entropy of every row ``[..., V]`` in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


@torch.no_grad()
def target_log_probs(teacher: Tensor, anchor: Tensor) -> Tensor:
    """Return log q of every token, ``[R, V]`` float64, from the logits ``[R, V]`` of teacher and anchor.

    H(softmax(m / k)) rises with k, so bisection over log k finds the k that gives the entropy of the anchor.  Where
    that k is above 1 + w, the bound 1 + w is the end of the search.  An anchor without any doubt counts as one with
    the entropy 1e-6, since with its own entropy, which is rounding noise, every k would do.
    """
    mix = TEACHER_WEIGHT * teacher.double() + anchor.double()
    wanted = entropy(anchor.double().log_softmax(-1)).clamp(min=1e-6)
    largest = 1 + TEACHER_WEIGHT
    low = torch.full_like(wanted, largest / 16).log()
    high = torch.full_like(wanted, largest).log()
    for _ in range(60):
        middle = (low + high) / 2
        too_sharp = entropy((mix / middle.exp()[:, None]).log_softmax(-1)) < wanted
        low, high = torch.where(too_sharp, middle, low), torch.where(too_sharp, high, middle)
    return (mix / high.exp()[:, None]).log_softmax(-1)


def reverse_kl(student: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of every token, ``[R]`` in nats, from the student's logits and log q, ``[R, V]`` each."""
    log_p = student.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# -- the step -------------------------------------------------------------------------------------------------------


def backward(
    student: Model,
    start: Model,
    problems: Sequence[PreparedProblem],
    responses: Sequence[list[int]],
    max_tokens: int,
    *,
    follows: bool,
) -> float:
    """Leave the gradient of the mean loss over the tokens of all ranks in the parameters; return the mean.

    ``follows``: whether the anchor is the student, not the start.
    Collectives: one sum of the number of tokens and the loss, and one of the gradients.
    """
    student.gpt.zero_grad(set_to_none=True)
    device = next(student.gpt.parameters()).device
    counts = torch.tensor([sum(map(len, responses)), 0.0], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    num_tokens, loss = float(counts[0]), torch.zeros((), dtype=torch.float64, device=device)
    longest = [len(problem.teacher_prompt) + len(r) for problem, r in zip(problems, responses, strict=True)]
    for several in _within(range(len(problems)), longest, max_tokens):
        read = [responses[i] for i in several]
        with torch.no_grad():
            teacher = response_logits(start, [problems[i].teacher_prompt for i in several], read)
            reference = response_logits(start, [problems[i].student_prompt for i in several], read)
        own = response_logits(student, [problems[i].student_prompt for i in several], read)
        part = reverse_kl(own, target_log_probs(teacher, own if follows else reference)).sum() / num_tokens
        part.backward()
        loss += part.detach()
    for parameter in student.gpt.parameters():
        if parameter.grad is None:  # a rank without a problem
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(loss)
    return float(loss)


def train(
    student: Model, start: Model, problems: Sequence[PreparedProblem], end: int, numbers: Numbers, grid: RankGrid
) -> Iterator[float]:
    """Train the student, and yield the loss of each step after its gradient is there and before its update.

    ``start``: the same weights as the student's, which stay.  ``end``: the token that ends a response.
    """
    optimizer = torch.optim.Adam(student.gpt.parameters(), betas=(0.9, 0.95), eps=1e-8)
    order = batches(problems, numbers.global_batch_size, numbers.seed)
    follows = len(problems) > 1 and len({problem.solution for problem in problems}) == 1
    for step in range(numbers.num_steps):
        batch = next(order)
        # A problem that comes twice in a batch has a seed of its own each time.
        seeds = [sample_seed(numbers.seed, step, it.id, batch[:place].count(it)) for place, it in enumerate(batch)]
        own, seeds = batch[grid.rank :: grid.world_size], seeds[grid.rank :: grid.world_size]
        responses = sample(student, [problem.student_prompt for problem in own], seeds, numbers, end)
        yield backward(student, start, own, responses, numbers.max_tokens, follows=follows)
        torch.nn.utils.clip_grad_norm_(student.gpt.parameters(), MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = numbers.learning_rate * min(1, (step + 1) / numbers.warmup_steps)
        optimizer.step()


def accuracy(model: Model, problems: Sequence[PreparedProblem], tokenizer: Any, numbers: Numbers) -> float:
    """Return the share of the problems whose greedy response ends in the answer."""
    end = tokenizer.eos_token_id
    prompts = [problem.student_prompt for problem in problems]
    responses = sample(model, prompts, [0] * len(problems), numbers, end, greedy=True)
    num_right = 0
    for response, problem in zip(responses, problems, strict=True):
        text: str = tokenizer.decode([token for token in response if token != end])
        num_right += text.endswith(problem.answer)
    return num_right / len(problems)


def main(arguments: Sequence[str], numbers: Numbers) -> None:
    """Train on the files of the command line, or on those of the quickstart, and print losses and accuracies."""
    files = [Path(argument) for argument in arguments] or of_the_quickstart(Path("runs"))
    checkpoint, tokenizer_path, problem_file, *held_out_file = files
    silence_known_warnings()
    grid = ranks.initialize(ParallelConfig(), numbers.seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
    problems = read_problems(problem_file, tokenizer, numbers.teacher_template)
    held_out = [it for file in held_out_file for it in read_problems(file, tokenizer, numbers.teacher_template)]
    student, start = (load_model(checkpoint, len(tokenizer), grid) for _ in range(2))
    end = int(tokenizer.eos_token_id)

    def report(line: str) -> None:
        if grid.rank == 0:
            print(line, flush=True)

    if held_out:
        report(f"{len(held_out)} held-out problems before: {accuracy(student, held_out, tokenizer, numbers):.3f}")
    for step, loss in enumerate(train(student, start, problems, end, numbers, grid), start=1):
        report(f"step {step}: loss {loss:.4f}")
    if held_out:
        report(f"{len(held_out)} held-out problems after: {accuracy(student, held_out, tokenizer, numbers):.3f}")
    ranks.shutdown()


def of_the_quickstart(directory: Path) -> list[Path]:
    """Return checkpoint, tokenizer, problems and held-out problems of the newest ``make quickstart``."""
    bases = sorted(directory.glob("bases/subtraction-seed5-*"), key=lambda path: path.stat().st_mtime)
    if not bases:
        raise SystemExit(
            f"{directory}/bases has no model of the quickstart: run `make quickstart`, or name other files"
        )
    base, problems = bases[-1], directory / "quickstart" / "seed5" / "train.jsonl"
    return [base / "checkpoints", base / "tokenizer", problems, base / "held_out.jsonl"]


if __name__ == "__main__":
    main(sys.argv[1:], Numbers())
