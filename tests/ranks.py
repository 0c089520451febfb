"""Processes that run the same function as the ranks of a group, for tests of `attn_n.distributed`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60  # seconds that a rank waits for another one


class Ranks:
    """As many processes, started once: `run` runs one function after the other in all of them."""

    def __init__(self, size: int, backend: str, timeout: float = TIMEOUT) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "pytest"])  # imported once, not by each rank
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, backend, str(store), timeout, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def results(self, function: Callable[..., Any], *arguments: Any, within: float = 2 * TIMEOUT) -> list[str | None]:
        """Return, of each rank, the traceback of its exception, "died", or None if there was none."""
        found: list[str | None] = []
        for pipe in self._pipes:
            pipe.send((function, arguments))
        for rank, pipe in enumerate(self._pipes):
            try:
                found.append(pipe.recv() if pipe.poll(within) else f"rank {rank} said nothing for {within} s")
            except EOFError:
                found.append("died")
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Fail the test if the function raises in a rank."""
        failed = [text for text in self.results(function, *arguments) if text is not None]
        if failed:
            self.stop()  # ranks may wait for each other
            pytest.fail("\n".join(failed), pytrace=False)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # of a rank that has died
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class Pools:
    """Ranks by their number, started when they are first asked for, and again after a failure."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], Ranks] = {}

    def __call__(self, size: int, backend: str = "gloo") -> Ranks:
        pool = self._pools.get((size, backend))
        if pool is None or not pool.alive:
            pool = self._pools[size, backend] = Ranks(size, backend)
        return pool

    def stop(self) -> None:
        for pool in self._pools.values():
            if pool.alive:
                pool.stop()


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _serve(rank: int, size: int, backend: str, store: str, timeout: float, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            torch.manual_seed(0)
            function(*arguments)
            pipe.send(None)
        except Exception:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")
    dist.destroy_process_group()
