# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The replica that trains on each context, so that all data-parallel replicas compute equally much."""

from __future__ import annotations

from collections.abc import Sequence


def placed(costs: Sequence[Sequence[int]], homes: Sequence[int], num_replicas: int) -> list[int]:
    """Return the replica of each context: its home where possible, so that few contexts travel.

    ``costs[i]``: the costs of context i in one or several units, of which the last one is its whole cost.
    ``homes[i]``: the replica that has context i.  The dearest context is placed first.  A context stays at home as long
    as no cost of its home exceeds an equal share of the global batch and the cost of the dearest context, which no
    placement can avoid.  Otherwise the context goes to the replica where the greatest share of the replica in the costs
    of the global batch is then least.  The result is deterministic.  Collectives: none.
    """
    totals = [sum(column) for column in zip(*costs, strict=True)]
    dearest = [max(column) for column in zip(*costs, strict=True)]
    bounds = [max(total, num_replicas * most) for total, most in zip(totals, dearest, strict=True)]
    loads = [[0] * len(totals) for _ in range(num_replicas)]
    replicas = list(homes)

    def with_cost(replica: int, cost: Sequence[int]) -> list[int]:
        return [load + more for load, more in zip(loads[replica], cost, strict=True)]

    def largest_share(replica: int, cost: Sequence[int]) -> float:
        return max(load / (total or 1) for load, total in zip(with_cost(replica, cost), totals, strict=True))

    for index in sorted(range(len(costs)), key=lambda i: -costs[i][-1]):
        cost, replica = costs[index], homes[index]
        if any(num_replicas * load > bound for load, bound in zip(with_cost(replica, cost), bounds, strict=True)):
            replica = min(range(num_replicas), key=lambda other: largest_share(other, cost))
        replicas[index], loads[replica] = replica, with_cost(replica, cost)
    return replicas
