# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Veto: the target is a mix of the teacher with the current student, at a fixed place.

Algorithm: The student samples one response per problem. The teacher, which sees the solution, reads it. Every token
learns the geometric mean of the teacher and the current student, so that the target is never far from the student.

Equation:

    q = softmax( (1 - alpha) s + alpha t )       s, t: logits of student and teacher; q is a constant
    w = 1,   a = 0;   D = KL(q || student) over the whole vocabulary

With target.teacher_weight=v the k of target.rule=fixed is 1 + v, and softmax((v t + s) / k) is this target for
v = alpha / (1 - alpha). alpha = 1 is target=teacher_alone.

Paper: Veto, Jang et al. (arXiv 2601.07155), of which the abstract was read. Published are a target between student and
teacher in logit space, a number beta that sets it, and the aim: under forward KL, tokens in which the student has no
confidence have harmful gradients.

Differences: Ours are alpha = 1/2, weights that sum to 1, forward KL, and the frozen weights behind the solution as the
teacher (published: a larger model). The abstract has neither the formula nor a schedule of beta. With
target.teacher_weight=v target.k=v the target is softmax(t + s / v), in which the teacher keeps its full weight.

Expected: 100 steps of 32 responses raise the sampled accuracy from .37 to .61 on subtraction and from .57 to .94 on
additions. With loss.divergence=reverse_kl they raise it to .99 and .95 (seed 21, the tasks of
docs/recipes/comparison.md).

Known failure: The target moves with the student, and the teacher is its only fixed point. So alpha sets how fast the
student gets there, and what only a leaking hint explains arrives later, but it arrives (docs/method.md).
"""
