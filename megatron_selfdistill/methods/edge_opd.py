# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""EDGE-OPD: guided responses, and a loss at the tokens alone that the teacher finds likelier than the student.

Algorithm: Responses are sampled with the hint in sight, so that what the hint asks for occurs in them. Student and
teacher read them, the student without the hint, and a pass without gradients measures what both give each token. The
student learns the teacher's whole distribution at the tokens that the hint supports.

Equation:

    a = 0,   w = 1 / W if log q(y) >= log p(y) + margin, else 0
    D = KL(teacher || student) over the whole vocabulary

margin is method.evidence_margin in nats, and W is the share of the tokens with log q(y) >= log p(y) + margin.

Paper: EDGE-OPD, Lazaridis et al. (arXiv 2605.23493), of which the abstract and accounts by others were read. Published
are guided responses for a part of the prompts, whose loss does not see the hint, and the mask. Without guided responses
on-policy self-distillation does not learn a persona at all, and most of its signal lies at the tokens with the largest
log q(y) - log p(y).

Differences: Ours are guided responses for all problems (rollout.guide_below guides those that are seldom solved, and
rollout.guidance=none none), forward KL, a margin of 0, the frozen weights behind the solution as the teacher, and the
division by the number of chosen tokens. With a target of the teacher alone, a guided response is the teacher's own. The
accounts do not have the published divergence, margin, share of guided prompts and rate. Any target goes with the mask:
recipe=default method.token_weights=evidence has that of the default.

Command: Guided responses need rollout.engine=megatron (docs/rollouts.md).

    selfdistill recipe=edge_opd checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/edge

Expected: 100 steps of 32 responses raise the sampled accuracy from .37 to .98 on subtraction and from .57 to .94 on
additions, and with rollout.guidance=none to .99 and .95. Forward KL at all tokens ends at .56 and .94 (`opsd`; seed 21,
the tasks of docs/recipes/comparison.md). No persona has been measured here. The paper reports that a persona is learnt,
and that general abilities change less than without the mask.

Known failure:
- The mask looks at the token that was sampled. Where the student samples a token that the teacher would not, the
  teacher's distribution is what would correct the student, and the mask leaves it out.
- Where the teacher never finds a token likelier, as behind a hint that says nothing, a step changes nothing.
- Each step takes one more forward pass of student and teacher.
"""
