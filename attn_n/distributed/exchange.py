"""Point-to-point messages that travel while a rank computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from attn_n.distributed.groups import Ranks


class Exchange:
    """What this rank sends to one rank and receives from another one; `received` waits for both."""

    def __init__(self, ranks: Ranks, to: int, sent: Sequence[Tensor], source: int, expected: Sequence[Tensor]) -> None:
        """Start it. `sent` is contiguous, and `expected` is memory; empty tensors are not exchanged."""
        self._sent, self._expected = sent, expected  # which have to live until both have arrived
        messages = [
            dist.P2POp(operation, x, ranks.global_rank(peer), ranks.group)
            for operation, tensors, peer in ((dist.isend, sent, to), (dist.irecv, expected, source))
            for x in tensors
            if x.numel()
        ]
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def received(self) -> Sequence[Tensor]:
        """Wait, on an accelerator only its stream, and return what came.

        Raises:
            RuntimeError: a rank has died, or the timeout of the group has passed.
        """
        for work in self._works:
            work.wait()
        self._works, self._sent = [], ()
        return self._expected


_met: set[dist.ProcessGroup] = set()


def meet(ranks: Ranks, device: torch.device) -> None:
    """Make NCCL's communicator of a group when it is first used: all of its ranks have to be there, and a step of a
    ring may have messages for some of them alone."""
    if device.type == "cuda" and ranks.size > 1 and ranks.group not in _met:
        dist.all_reduce(torch.zeros(1, device=device), group=ranks.group)
        _met.add(ranks.group)
