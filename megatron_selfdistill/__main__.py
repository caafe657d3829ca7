# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``python -m megatron_selfdistill``: the program ``selfdistill``, which torchrun can start on several ranks.

torchrun --nproc-per-node 8 -m megatron_selfdistill evaluate --hf /models/Qwen3-8B --data test.jsonl --out before
"""

from __future__ import annotations

import sys

from megatron_selfdistill.cli import command_of, main

if __name__ == "__main__":
    if command_of(sys.argv[1:]) == "train":
        from megatron_selfdistill.distributed import stop

        stop.ignore_signals()  # torchrun ends all ranks after the first one, and each has a status to keep
    sys.exit(main())
