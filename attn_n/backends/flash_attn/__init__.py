"""The installed FlashAttention 2, 3 and 4, called by their explicit forward and backward; `attn_n.sink` applies n."""

from __future__ import annotations

from collections.abc import Sequence

from attn_n.backends.base import Backend, Family
from attn_n.backends.flash_attn.version_2 import FlashAttention2
from attn_n.backends.flash_attn.version_3 import FlashAttention3
from attn_n.backends.flash_attn.version_4 import FlashAttention4
from attn_n.call import AttentionCall


class FlashAttn(Family):
    name = "flash_attn"
    summary = "the installed FlashAttention: 4, 3 or 2"

    def __init__(self) -> None:
        versions: tuple[Backend, ...] = (FlashAttention4(), FlashAttention3(), FlashAttention2())
        self.members = {version.name.partition(":")[2]: version for version in versions}

    def priority(self, call: AttentionCall) -> Sequence[str]:
        return tuple(self.members) if call.device == "cuda" else ()


BACKEND = FlashAttn()
