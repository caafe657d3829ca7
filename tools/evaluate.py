#!/usr/bin/env python
# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Evaluate a model on problems with answers: the same as ``selfdistill evaluate``, from a checkout."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # an installed package comes first
from megatron_selfdistill.instruments.evaluate.evaluate_command import main

if __name__ == "__main__":
    sys.exit(main())
