# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On-policy self-distillation: the frozen weights behind the solution teach every token, by forward KL.

Algorithm: The student samples one response per problem. The frozen weights of the start read it after the worked
solution, with the request to understand the solution and then to reason in the model's own words. Every token learns
their whole distribution.

Equation:

    w = 1,   a = 0;   D = KL(teacher || student) over the whole vocabulary

Paper: OPSD, Zhao et al. (arXiv 2601.18734). Published are template, divergence, teacher, number of steps and tokens,
and the learning rate (with LoRA of rank 64; here all weights are trained).

Differences: Not taken over are the temperature of 1.1 in rollout and loss, and the clamp of each column of the
divergence at .05. The clamp makes the loss negative and reverses the gradient of what it clamps. With it 19 to 30 % of
the answers ended in endless loops under a thinking teacher, and about 1 % without it (arXiv 2609.38995). The mix with
the reference is its replacement: target=capped target.anchor=reference.

Command:

    selfdistill recipe=opsd checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/opsd

Expected: 100 steps of 32 responses raise the sampled accuracy on additions from .51 to .92, and leave subtraction at
.35, from .36 before (docs/recipes/comparison.md).

Cost: A step samples one response per problem and runs the teacher once.

Known failure:
- Collapse after 100 to 200 steps.
- Tokens of style carry 6 to 15 times the divergence of other tokens.
- Losses of up to 40 % outside of the trained domain.
"""

from __future__ import annotations

from megatron_selfdistill.methods.default import DefaultSettings, SelfDistillation


class Opsd(SelfDistillation):
    """The default method; the recipe sets target, divergence, wording and teacher as published."""

    Settings = DefaultSettings
