# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The material of the checks: the layouts of a launch, a tiny model, its texts and complete configurations."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_selfdistill import config as configuration
from megatron_selfdistill.compat import cpu
from megatron_selfdistill.config import Config, ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.distributed.ranks import RankGrid

END, PADDING = "$", "_"
ALPHABET = "".join(c for c in string.digits + string.ascii_letters + "+=|:. " if c not in END + PADDING) + END + PADDING
NUM_PROBLEMS, GLOBAL_BATCH_SIZE = 64, 16
MAX_TOKENS = 64
"""The tokens of a packed sequence: few enough for several microbatches."""
_LARGEST_TP = 8


@dataclass(frozen=True)
class LaunchUnderTest:
    """The launch that the checks test."""

    rank: int
    world_size: int
    directory: Path
    """The directory for files that all ranks see."""
    sampler: str
    """The sampler to test: megatron or vllm."""
    open_group: Callable[[str, timedelta], None]
    limit_s: float
    """The seconds of all checks together, after which the meeting ends."""

    @property
    def precision(self) -> str:
        """The precision of the checks' models: fp32, but bf16 on GPUs, whose attention kernels need it."""
        return "fp32" if cpu.ON_CPU else "bf16"

    @property
    def largest_tp(self) -> int:
        """The largest power of two, at most 8, that divides the world size."""
        return max(tp for tp in (1, 2, 4, _LARGEST_TP) if self.world_size % tp == 0)

    def cut(self, tp: int = 1, pp: int = 1) -> ParallelConfig:
        """Return the layout of TP (with SP) x PP; the rest of the ranks is DP."""
        return ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=tp > 1,
            distributed_timeout_minutes=self.timeout.total_seconds() / 60,
        )

    def padded_vocab_size(self, vocab_size: int, grid: RankGrid) -> int:
        """Return the rows of a vocabulary, padded to a multiple of 128 x TP as Megatron does."""
        step = 128 * grid.tp_size
        return -(-vocab_size // step) * step

    @property
    def timeout(self) -> timedelta:
        """The timeout of a collective; NCCL ends the process then, so on GPUs the meeting must give up first."""
        return timedelta(minutes=2) if cpu.ON_CPU else timedelta(seconds=self.limit_s + 120)

    def new_group(self) -> None:
        """Open a new default process group, which `ranks.initialize` then uses."""
        self.open_group("gloo" if cpu.ON_CPU else "nccl", self.timeout)

    def grid(self, cuts: ParallelConfig) -> RankGrid:
        """Open a new process group and Megatron's groups; return the rank grid."""
        self.new_group()
        return ranks.initialize(cuts, seed=1)

    def new_run_dir(self, name: str) -> Path:
        """Return a new directory for a run.  Raises: OSError where this rank does not see the directory."""
        if not self.directory.is_dir():
            raise OSError(f"{self.directory} of rank 0 is not there: set TMPDIR to a directory that all nodes see")
        return self.directory / name

    def config(self, cuts: ParallelConfig, run_dir: Path, *more: str) -> Config:
        """Return the configuration of a run of the tiny model on sums; ``more`` overrides its keys."""
        return configuration.load(
            [
                f"run_dir={run_dir}",
                f"data.path={self.directory}/problems.jsonl",
                f"data.tokenizer={self.directory}/tokenizer",
                "data.teacher_template='{problem}H{solution}|'",
                f"data.global_batch_size={max(GLOBAL_BATCH_SIZE, self.world_size)}",
                "rollout.max_new_tokens=12",
                "rollout.kv_cache_gb=0.25",
                f"schedule.max_tokens={MAX_TOKENS}",
                f"optimizer.precision={self.precision}",
                "metrics.console_every=0",
                "metrics.loggers=[]",
                "checkpoint.keep_last=null",
                "stop.time_limit_minutes=1e6",  # overrides the time limit that Slurm states
                "stop.hang_timeout_minutes=0",  # the meeting watches
                *self._model(),
                *(f"parallel.{name}={_spelt(getattr(cuts, name))}" for name in ParallelConfig.__dataclass_fields__),
                *more,
            ]
        )

    def _model(self) -> list[str]:
        # Heads as wide as vLLM's kernels want them, and enough of them for TP 8.
        hidden, channels = (64, 32) if cpu.ON_CPU else (256, 64)
        groups = max(2, self.largest_tp)
        return [
            "model.num_layers=2",
            f"model.hidden_size={hidden}",
            f"model.ffn_hidden_size={2 * hidden}",
            f"model.kv_channels={channels}",
            f"model.num_attention_heads={2 * groups}",
            f"model.num_query_groups={groups}",
            f"model.init_method_std={hidden**-0.5}",
            "model.make_vocab_size_divisible_by=8",
            "model.max_position_embeddings=64",
        ]


def write_texts(directory: Path) -> None:
    """Write a tokenizer with one token per character, and sums with their results as hints."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token=PADDING))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, unk_token=PADDING)
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(directory / "tokenizer")
    rng = random.Random(3)
    terms = [(rng.randrange(1000), rng.randrange(10 ** rng.randrange(1, 6))) for _ in range(NUM_PROBLEMS)]
    records = [{"problem": f"{a}+{b}=", "solution": f"{a + b}", "id": str(i)} for i, (a, b) in enumerate(terms)]
    (directory / "problems.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def contexts(grid: RankGrid, *, same_prompt: bool) -> list[ContextPair]:
    """Return this replica's share of contexts of random tokens, with equal prompts if ``same_prompt``."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(len(ALPHABET)) for _ in range(count)]

    pairs = []
    for index in range(3 * grid.dp_size + 3):
        prompt, hint = tokens(rng.randrange(3, 12)), tokens(rng.randrange(2, 9))
        response = tokens(rng.randrange(4, 20))
        pairs.append(ContextPair(f"p{index}", prompt, prompt if same_prompt else hint + prompt, response, False))
    return pairs[grid.dp_rank :: grid.dp_size]


def _spelt(value: object) -> str:
    return "null" if value is None else str(value).lower()
