"""Values of all ranks of a process group, merged by the first and sent to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def merge_ranks(
    value: T, merge: Callable[[T, T], object], finish: Callable[[T], object], group: dist.ProcessGroup | None
) -> T:
    """``merge(value, other)`` of the values of all ranks, in their order, then ``finish(value)``: the same on each.

    The first rank holds two values at a time. A ValueError there is raised on all ranks, so that none waits.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    first = 0 if group is None else dist.get_global_rank(group, 0)
    outcome: list[object] = [None, None]
    if rank == 0:
        error: ValueError | None = None
        for index in range(1, size):
            received: list[object] = [None]
            # Received even after an error: its sender waits.
            dist.recv_object_list(received, index if group is None else dist.get_global_rank(group, index), group)
            try:
                if error is None:
                    merge(value, cast(T, received[0]))
            except ValueError as raised:
                error = ValueError(f"rank {index}: {raised}")
        if error is None:
            finish(value)
        outcome = [value, None] if error is None else [None, str(error)]
    else:
        dist.send_object_list([value], first, group)
    dist.broadcast_object_list(outcome, first, group)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return cast(T, outcome[0])
