# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands of ``selfdistill``, a module each; ``cli.py`` chooses among them."""
