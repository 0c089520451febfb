"""What torch.compile has to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Have torch.compile call `function` when it traces and keep the result as a constant.

    The same as `torch.compiler.assume_constant_result`, which would import all of torch._dynamo with `import attn_n`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
