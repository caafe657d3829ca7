# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM servers: the command that serves, the nodes of a server, and servers that a run starts."""
