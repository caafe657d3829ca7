# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schema of the configuration: one frozen dataclass per section, with a default and a meaning for every key."""
