"""How many workers a consolidation gets: as many as were asked for, and as the memory holds."""

from __future__ import annotations

from dataclasses import replace

from tsclust_ooc import budget
from tsclust_ooc import consolidate as work_on
from tsclust_ooc.budget import Budget
from tsclust_ooc.pipeline.session import Session
from tsclust_ooc.plan import Plan
from tsclust_ooc.runtime import LEAST_WORKER_BYTES

_READERS_A_CORE = 2  # one writes to disk while another reads; more only wait for Python


def workers_for(held: Session, plan: Plan) -> int:
    """Workers: what was asked for, else a few threads a core or a process a core, as many as the memory holds."""
    each = work_on.array_bytes(plan) + process_bytes(held, plan)
    if held.options.scheduler == "threads" and held.options.workers is None:
        held = replace(held, limits=Budget(held.limits.memory_bytes, _READERS_A_CORE * budget.available_cores()))
    fit = held.workers_that_fit(each, "consolidation", work_on.plan_bytes(plan))
    here = held.options.scheduler in ("threads", "local")
    return min(fit, max(1, len(plan.partitions))) if here else fit


def process_bytes(held: Session, plan: Plan) -> int:
    """Bytes that a worker holds besides its arrays; nothing for a thread."""
    if held.options.scheduler == "threads":
        return 0
    return work_on.plan_bytes(plan) + (LEAST_WORKER_BYTES if held.options.scheduler == "local" else 0)
