# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the documentation's site is made of besides the pages of docs/: `hooks` is what MkDocs loads."""
