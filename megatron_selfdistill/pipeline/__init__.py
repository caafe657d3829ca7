# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One step through Megatron's pipeline-parallel schedules, with student and teacher as microbatches."""
