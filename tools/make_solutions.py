#!/usr/bin/env python
# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write a model's own verified solutions: the same as ``selfdistill solutions``, from a checkout."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # an installed package comes first
from megatron_selfdistill.methods.data_sets.solutions import main

if __name__ == "__main__":
    sys.exit(main())
