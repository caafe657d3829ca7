# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The form of a figure of a report."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from megatron_selfdistill.report.sick_rules import Rule


@dataclass(frozen=True)
class ReportFigure:
    """One figure of a report: some metrics over the steps."""

    title: str
    metrics: dict[str, str]
    """The key of a metric -> its name in the legend.  A key may end with ``*``, which stands for a number; ``*`` in the
    name is the same number."""
    unit: str
    """The unit of the values, as the axis shows it."""
    healthy: str
    """A sentence about a healthy curve."""
    sick: str
    """A sentence about a sick curve."""
    sick_since: Rule
    """The rule that ``sick`` states in words."""
    guarded: str | None = None
    """The metric whose limits (`run_record.limits`) the figure shows; None for a figure without limits."""

    def present(self, keys: Collection[str]) -> dict[str, str]:
        """Return the metrics of the figure that are in ``keys``, without ``*``, in the order of the legend."""
        found: dict[str, str] = {}
        for pattern, name in self.metrics.items():
            form = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
            matches = [(key, match) for key in keys if (match := form.fullmatch(key)) is not None]
            for key, match in sorted(matches, key=lambda pair: [int(number) for number in pair[1].groups()]):
                found[key] = name.replace("*", match[1]) if match.groups() else name
        return found
