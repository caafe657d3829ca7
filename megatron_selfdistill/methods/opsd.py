# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On-policy self-distillation: the frozen weights behind the solution teach every token, by forward KL.

Algorithm: The student samples one response per problem. The frozen weights of the start read it after the worked
solution, with the request to understand the solution and then to reason in the model's own words. Every token learns
their whole distribution.

Equation:

    w = 1,   a = 0;   D = KL(teacher || student) over the whole vocabulary

Paper: OPSD, Zhao et al. (arXiv 2601.18734). Published are template, divergence, teacher, sampling, numbers of steps and
tokens, and the learning rate (with LoRA of rank 64; here all weights are trained, and recipe=opsd_reference has the
adapters). The student samples with thinking off and the teacher reads with thinking on, as later studies state
(arXiv 2609.25623, 2609.38995); data.views has both. Chat templates without the variable enable_thinking ignore it.

Differences: Not taken over are the temperature of 1.1 in the loss, and the clamp of each column of the divergence at
.05. The clamp makes the loss negative and reverses the gradient of what it clamps. With it 19 to 30 % of the answers
ended in endless loops under a thinking teacher, and about 1 % without it (arXiv 2609.38995). The mix with the reference
is its replacement: target=capped target.anchor=reference.

Command:

    selfdistill recipe=opsd checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/opsd
    selfdistill recipe=opsd_reference checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/study

Expected: 100 steps of 32 responses raise the sampled accuracy on additions from .51 to .92 and on subtraction from .36
to .74, at temperature 1, with one view and the learning rate 1e-3, which validation has chosen. At 3e-4 they leave
subtraction at .35 (docs/recipes/comparison.md). No GPU has run recipe=opsd_reference for this project. These are the
published accuracies that it should reproduce, in percent, the mean of 12 samples with thinking on:

| Qwen3-1.7B | AIME24 | AIME25 | HMMT25 |
|---|---|---|---|
| base (authors / independent rerun) | 51.5 / 47.2 | 36.7 / 35.3 | 23.1 / 21.9 |
| OPSD, best step (within 100 / within 200) | 57.2 / 49.2 | 43.9 / 37.5 | 29.2 / 24.4 |

The pairing of the views decides the result. These are published accuracies on AIME25 of Qwen3-4B, all weights trained,
forward KL on the 128 most likely tokens, without clamp, at steps 25 and 200 (arXiv 2609.38995; base about .60 to .64):

| student thinks | teacher thinks | step 25 | step 200 |
|---|---|---|---|
| no | yes (recipe=opsd) | .62 | .57 |
| no | no | .65 | .61 |
| yes | yes | .58 | .52 |
| yes | no | .05 | .00 |

A run whose student thinks and whose teacher does not is warned of at its start.

Known failure:
- Collapse after 100 to 200 steps.
- Tokens of style carry 6 to 15 times the divergence of other tokens.
- Losses of up to 40 % outside of the trained domain.
"""
