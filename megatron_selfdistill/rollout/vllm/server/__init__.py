# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM servers for rollouts: the program that serves, and the processes that a run starts."""
