# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of the documentation's site besides the pages of docs/; MkDocs loads `hooks`."""
