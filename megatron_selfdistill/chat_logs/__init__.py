# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Chat logs: replies that another policy wrote, which a run trains on without generating a token."""
