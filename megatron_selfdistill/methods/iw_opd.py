# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""IW-OPD: the divergence from the teacher, with a smaller weight once the student and the teacher have differed.

Algorithm: The student samples one response per problem. The teacher, which sees the solution, reads it, and a pass
without gradients measures what both give each token. A token weighs more the less of the response's discrepancy lies
before it.

Equation:

    a = 0,   w_i = (1 + g (1 - sum over j < i of |A_j| / sum over all j of |A_j|)) / W
    A_j = log q(y_j) - log p(y_j);   D = KL(student || teacher) over the whole vocabulary

i counts the tokens of a response, g is method.iw_gain, and W is the mean of the numerators over the global batch.

Paper: IW-OPD, Xie et al. (arXiv 2606.22600), of which the abstract was read, and accounts of algorithm 1. A derivation
has a power of the ratio of both models' prefixes as the weight; the weight above is the published practical form.
Published are g = .5, one response per prompt, batches of 1024, temperature 1, a rate of 1e-5, up to 16384 new tokens,
and a larger teacher. The first 30 % of the tokens teach as much as all, and the last 30 % almost nothing.

Differences: Published is the policy gradient of the sampled token, -w_i A_i log p(y_i), in the clipped objective of
PPO. Ours is the gradient of the whole divergence, of which A_i is a sample. Ours are also the frozen weights behind the
solution as the teacher, the default's batch and length, and the division by the sum of the weights. Any target and
divergence go with the weights: recipe=default method.token_weights=iw_opd has those of the default.

Expected: 100 steps of 32 responses raise the sampled accuracy from .37 to .99 on subtraction and from .57 to .95 on
additions, as reverse KL does without the weights (`tip`; seed 21, the tasks of docs/recipes/comparison.md). Nothing is
known at a larger size. The paper reports up to 6.9 points on AIME 2025 at step 10, and more the smaller the student.

Known failure:
- The weights of a response lie between 1 and 1 + g. So a response that no teacher would write keeps at least two
  thirds of its weight with g = .5; method.token_weights=reach gives such tokens a weight near 0.
- With a teacher that is the student behind the solution, a study reports the opposite: early tokens are less reliable
  (arXiv 2605.21606, `pw_opsd`).
- Each step takes one more forward pass of student and teacher.
"""
