# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Working ahead: servers generate the responses of later steps while the trainer trains."""
