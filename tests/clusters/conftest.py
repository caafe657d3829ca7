# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What make test-clusters brings: the real Ray, the schemas of Kubernetes and hadolint."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("ray") else ["test_clusters.py"]
