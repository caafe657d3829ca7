# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-distillation fine-tuning: a moving average of the student behind a demonstration teaches every token.

Algorithm: The student samples one response per problem. A moving average of its weights reads the response after the
solution, which is shown as an example of a response. The student learns the average's whole distribution at every
token but the first three.

Equation:

    w = min(mean of rho over the response, 2) x N / (number of responses x length),   a = 0
    w = 0 for the first 3 tokens
    D = KL(teacher || student) over the whole vocabulary

Paper: SDFT (arXiv 2601.19897). Published are template, divergence, normalisation, skipped tokens, EMA decay, batch,
learning rate and correction (second-hand, from the trainer of CaOPD).

Differences: Our reading is that the weight of a sequence is the mean of rho over its tokens. A frozen teacher is
reported to be as good within noise: teacher.weights=frozen.

Expected: 100 steps of 32 responses raise the sampled accuracy on additions from .51 to .81, and lower it on subtraction
from .36 to .29 (docs/recipes/comparison.md). The decay belongs to a smaller learning rate than the table's.

Known failure:
- Models with long thinking, unless the demonstrations are regenerated with it.
- Demonstrations in another style than the model's: forward KL moves the student to the teacher's style.
"""
