"""The ranks that share a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class Ranks(NamedTuple):
    """A process group, the number of its ranks, and which of them this process is."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank % self.size)


def ranks_of(group: dist.ProcessGroup | DeviceMesh | None) -> Ranks:
    """Return the ranks of a process group or of a mesh with one dimension; None is the default group."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: expected torch.distributed to be initialised: call torch.distributed.init_process_group(), under"
            " torchrun without arguments"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a DeviceMesh with one dimension, got {group.ndim} of them: pass one by its name,"
                f" mesh[{(group.mesh_dim_names or ('name',))[-1]!r}]"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected None, a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a group that this process belongs to")
    return Ranks(group, dist.get_world_size(group), rank)
