# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""ESR: the divergence from the teacher on the first tokens of a response, which are all that is sampled.

Algorithm: The student samples the first rollout.horizon tokens of one response per problem. The teacher, which sees the
solution, reads them, and the student learns at each of them. Evaluations sample whole responses.

Equation:

    a = 0,   w = 1 for i <= rollout.horizon; nobody samples or reads a later token
    D = KL(student || teacher) over the whole vocabulary

Paper: ESR, Early Stopping Rollout, Zhou Ziheng et al. (arXiv 2605.27028), of which the abstract and an account were
read. Published are the first 100 tokens, reverse KL and the mean over the tokens. After 100 and more tokens of the
student a larger teacher no longer corrects the student but goes on as the student would. The paper reports better
results than with whole responses over sizes, families and tasks, at down to a 24th of the cost.

Differences: The published teacher is another, larger model; ours is the student's start behind the solution. Ours are
the default's batch, rate and rollout.max_new_tokens, which evaluations keep. Any target goes with the horizon:
recipe=default rollout.horizon=100 has that of the default, and rollout.horizon=[FIRST,LAST,STEPS] grows.

Expected: not measured here. The responses of the quickstart's tasks are shorter than 100 tokens.

Known failure:
- No end of a long response is trained, and nothing that only a whole response shows: rewards, verifiers and selections
  are refused.
- With a teacher that is the student behind the solution, a study reports that early tokens are less reliable (arXiv
  2605.21606, `pw_opsd`).
"""
