#!/usr/bin/env python
# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Report what this node has and lacks for a run: the same as ``selfdistill doctor``, from a checkout."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # an installed package comes first
from megatron_selfdistill.instruments.doctor.doctor_command import main

if __name__ == "__main__":
    sys.exit(main())
