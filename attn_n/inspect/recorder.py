"""Recording: which module runs, the attention calls in it, and what it returns."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_n.call.canonical import Canonical
from attn_n.call.errors import UnsupportedError
from attn_n.dispatch import run
from attn_n.inspect import text
from attn_n.inspect.attention import Heads, HeadSums
from attn_n.inspect.moments import Accumulator, Distribution


class Record:
    """The statistics that were recorded so far; printed, they are a table."""

    def __init__(self) -> None:
        self._attention: dict[str, HeadSums] = {}
        self._activations: dict[str, Accumulator] = {}

    @property
    def attention(self) -> dict[str, Heads]:
        """What the heads did, by the name of the module; `name#1` and so on where it attends more than once."""
        found = {name: sums.heads() for name, sums in self._attention.items()}
        return {name: heads for name, heads in found.items() if heads is not None}

    @property
    def activations(self) -> dict[str, Distribution]:
        """The distribution of what each module returned (the first floating tensor of it), by its name."""
        found = {name: values.distribution() for name, values in self._activations.items()}
        return {name: distribution for name, distribution in found.items() if distribution is not None}

    def json(self) -> str:
        """Return all of it as JSON, null for what is not finite."""
        parts: dict[str, dict[str, Any]] = {"attention": self.attention, "activations": self.activations}
        return json.dumps({part: {k: _finite(asdict(x)) for k, x in each.items()} for part, each in parts.items()})

    def draw(self, path: str | Path) -> None:
        """Write a picture, in a format that matplotlib knows by the suffix of the path.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from attn_n.inspect.picture import draw

        draw(self.attention, self.activations, path)

    def __str__(self) -> str:
        return text.table(self.attention, self.activations)


@contextlib.contextmanager
def record(model: nn.Module, layers: Sequence[str] | None = None) -> Iterator[Record]:
    """Record what the attention heads and the activations of a model do in its forward passes, within `with`.

        with attn_n.inspect.record(model) as record:
            for batch in batches:
                model(batch)
        print(record)

    Every call of this library's attention functions within a module counts, whoever serves it, and all batches are
    merged; the statistics are exact, also under masks, windows, GQA, padding and over KV caches. Dropout is not in
    them. Memory stays bounded: the logits are computed once more, block by block. Compiled modules run eagerly
    meanwhile. What activation checkpointing computes again in a backward is not counted twice. Attention that
    `merge_attention` puts together is recorded part by part.

    Args:
        model: any module; what runs outside of it is not recorded.
        layers: names of its modules (`model.named_modules()`), or patterns such as `"blocks.*.attention"`, to which the
            record is restricted.

    Raises:
        ValueError: a name or pattern fits no module.
        UnsupportedError: the model runs within a transform of torch.func or the capture of a CUDA graph.
    """
    names = {name or type(model).__name__: module for name, module in model.named_modules()}
    for pattern in layers or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"layers: expected names or patterns of modules, got {pattern!r}, which fits none")
    chosen = [name for name in names if layers is None or any(fnmatch.fnmatchcase(name, each) for each in layers)]
    found = Record()
    recorder = _Recorder(found, frozenset(chosen))
    handles = [handle for name, module in names.items() for handle in recorder.follow(name, module)]
    run.watchers.append(recorder.attended)
    # To import it takes seconds, and without it nothing is compiled.
    eagerly = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with eagerly:
            yield found
    finally:
        run.watchers.remove(recorder.attended)
        for handle in handles:
            handle.remove()


class _OfThread(threading.local):
    """The modules that run in this thread, the innermost last, with the number of attention calls each made."""

    def __init__(self) -> None:
        self.running: list[tuple[str, list[int]]] = []


class _Recorder:
    def __init__(self, found: Record, names: frozenset[str]) -> None:
        self._found = found
        self._names = names
        self._of_thread = _OfThread()

    def follow(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        """Hook a module; the handles undo it."""

        def begins(module: nn.Module, inputs: Any) -> None:
            self._of_thread.running.append((name, [0]))

        def ends(module: nn.Module, inputs: Any, output: Any) -> None:
            self._of_thread.running.pop()
            x = _first_tensor(output)
            if name in self._names and x is not None and not _recomputes():
                _refuse_transforms()
                self._found._activations.setdefault(name, Accumulator()).add(x)

        return module.register_forward_pre_hook(begins), module.register_forward_hook(ends, always_call=True)

    def attended(self, call: Canonical) -> None:
        """See a call before it is served."""
        if not self._of_thread.running or _recomputes():
            return
        name, calls = self._of_thread.running[-1]
        place = f"{name}#{calls[0]}" if calls[0] else name
        calls[0] += 1
        if name in self._names:
            _refuse_transforms()
            self._found._attention.setdefault(place, HeadSums()).add(call)


def _recomputes() -> bool:
    """Return True within a backward, where activation checkpointing runs a forward again."""
    graph_task: int = torch._C._current_graph_task_id()
    return graph_task != -1


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            "attn_n.inspect: a transform of torch.func hides the values.\nTo do: record a pass without it."
        )
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "attn_n.inspect: a CUDA graph that is captured would not record its replays.\nTo do: record an eager pass."
        )


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((x for x in map(_first_tensor, output) if x is not None), None)
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
