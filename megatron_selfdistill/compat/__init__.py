# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Changes to Megatron Core: replacements for a CPU, repairs of wrong results, and filters for warnings."""
