"""A dictionary that holds what was put into it last."""

from __future__ import annotations

import threading
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """It drops its oldest entry for a new one: lengths may never come again, and the garbage collector visits them all.

    Reading it needs no lock, and `put` may be called by several threads.
    """

    def __init__(self, most: int = 256) -> None:
        super().__init__()
        self.most = most
        self._lock = threading.Lock()

    def put(self, key: K, value: V) -> V:
        with self._lock:
            if len(self) >= self.most:
                del self[next(iter(self))]
            self[key] = value
        return value
