# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The published methods: one file for each, which `config.methods` finds by its name.

The docstring of a file is the page of its method: tools/docs_site/methods.py makes recipes/NAME.md of the site from it.
In the equations, every response token has the loss w D(p, q) + a (-log p), divided by the number N of response tokens
of the step.  p is the probability of the token under the student, q under teacher or target, mu when the token was
sampled, and rho = p / mu.  A coefficient w or a that an equation does not name is w = 1 or a = 0.
"""
