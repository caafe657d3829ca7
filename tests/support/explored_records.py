# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Records of explored responses: as tensors again, and made of random logits."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.instruments.explorer.explored import ExploredResponse, TokenTarget
from megatron_selfdistill.instruments.explorer.logit_summary import LogitSummary, shapes, summarise_logits
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy


def summary_of(record: Mapping[str, Any]) -> LogitSummary:
    tensors = []
    for name, shape in shapes(len(record["models"])).items():
        dtype = np.dtype("<i4" if name == "ids" else "<f4")
        values = [np.frombuffer(base64.b64decode(block[name]), dtype).reshape(-1, *shape) for block in record["blocks"]]
        tensors.append(torch.from_numpy(np.concatenate(values).astype(np.float64)))
    return LogitSummary(*tensors)


def target_of(record: Mapping[str, Any]) -> Target:
    settings = record["settings"]
    anchored = settings["anchor"] == "reference"
    fields = {name: settings[name] for name in "rule teacher_weight k_max k anchor num_controls".split()}
    return Target(**fields, match=settings["match"] if anchored else None)


class Words:
    """A tokenizer of numbered words, some of which are markup, white space or nothing."""

    NASTY = ("</script><script>document.title = 'run'</script>", "<img src=x onerror=alert(1)>", "\n", "  ", "")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(self.NASTY[i] if i < len(self.NASTY) else f" w{i}" for i in ids)


def logit_rows(num_tokens: int, vocab_size: int, num_models: int) -> list[Tensor]:
    """Return logits of student, teacher, reference and c of controls, which agree at most of the tokens."""
    generator = torch.Generator().manual_seed(17)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = 1.6 * normal(num_tokens, vocab_size)
    heads = torch.randint(vocab_size, (num_tokens, 6), generator=generator)
    height = 6 + 9 * torch.rand(num_tokens, 1, generator=generator)
    base.scatter_(1, heads, height + 1.5 * normal(num_tokens, 6))
    teacher = base + 0.5 * normal(num_tokens, vocab_size)
    teacher[::9].scatter_(1, heads[::9, :1], 16.0)
    student = base + 0.3 * normal(num_tokens, vocab_size)
    control = (teacher + 0.4 * normal(num_tokens, vocab_size)).log_softmax(1)
    return [student, teacher, base, control][:num_models]


def record_of(
    rows: Sequence[Tensor], target: Target, divergence: Divergence | None = None, **about: Any
) -> dict[str, Any]:
    return explored_of(rows, target, divergence).record(cast(Any, Words()), **about)


def explored_of(rows: Sequence[Tensor], target: Target, divergence: Divergence | None = None) -> ExploredResponse:
    """Return a response whose tokens are sampled from the student's logits, with the loss's numbers."""
    student, teacher, *rest = rows
    told, unit = (teacher - rest.pop(), 1.0) if target.num_controls else (teacher, 1 + target.teacher_weight)
    divergence = divergence or Divergence()
    vocab = VocabShard(0, student.shape[1], student.shape[1])
    tokens = torch.multinomial(student.softmax(1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    tokens[: len(Words.NASTY)] = torch.arange(len(Words.NASTY))[: len(tokens)]
    mixed = (target.teacher_weight * told + rest[0]) / unit if target.is_anchored else told
    needed = vocab_entropy(rest[0], vocab) if target.needs_reference_entropy else None
    options = {"target": target, "divergence": divergence, "vocab": vocab, "reference_entropy": needed}
    stats = distillation_loss(student, mixed, tokens, **options)
    names = "loss reverse_kl student_entropy target_entropy wanted_entropy beta status student_log_prob".split()
    numbers = {name: getattr(stats, name).double().tolist() for name in names}
    numbers["teacher_entropy"] = vocab_entropy(teacher, vocab).tolist()
    numbers["reference_entropy"] = (vocab_entropy(rest[0], vocab) if rest else torch.full(tokens.shape, nan)).tolist()
    context = ContextPair("p<1>", [5, 6], [7, 5, 6], tokens.tolist(), truncated=False)
    settings, summary = TokenTarget(target, divergence), summarise_logits(rows, vocab, target.num_controls > 0)
    return ExploredResponse(context, "<b>a solution</b>", settings, numbers, summary, vocab.vocab_size)
