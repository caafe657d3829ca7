# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands of ``selfdistill``, one module per command; ``cli.py`` chooses the command."""
