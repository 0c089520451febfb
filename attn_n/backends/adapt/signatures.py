"""Checks that private functions of other libraries still have the signatures that the backends call."""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType

import torch

from attn_n.compilation import constant_when_compiled


@constant_when_compiled
def changed_operator(*signatures: str) -> str | None:
    """Return the reason why private operators cannot be called; None if they can.

    A signature `"name(arg, arg, *, keyword) -> results"` says what is relied upon, since a library may change its
    operators in any release: the positional arguments must begin as given, the keywords must exist, and the number of
    results must agree where it is given. Names are those of `torch.ops`.
    """
    return next((reason for reason in map(_changed, signatures) if reason is not None), None)


@cache
def _changed(signature: str) -> str | None:
    name, _, rest = signature.partition("(")
    arguments, _, results = rest.partition(")")
    positional, _, keywords = arguments.partition(", *, ")
    namespace, _, short = name.partition("::")
    owner = f"PyTorch {torch.__version__}" if namespace == "aten" else "the installed library"
    operator = getattr(getattr(torch.ops, namespace), short, None)
    if operator is None:
        return f"{owner} has no operator {name}"
    schema = operator.default._schema
    by_position = [argument for argument in schema.arguments if not argument.kwarg_only]
    wanted = positional.split(", ")
    if (
        [argument.name for argument in by_position[: len(wanted)]] != wanted
        or not all(argument.has_default_value() for argument in by_position[len(wanted) :])
        or not {argument.name for argument in schema.arguments}.issuperset(keywords.split(", ") if keywords else ())
        or (results and len(schema.returns) != int(results.removeprefix(" -> ")))
    ):
        return f"{owner} has changed its operator {name}: {schema}"
    return None


@cache  # inspecting takes milliseconds
def changed_function(module: ModuleType, name: str, *arguments: str) -> str | None:
    """Return the reason why a private function cannot be called with `arguments` by name; None if it can."""
    function = getattr(module, name, None)
    if function is None:
        return f"the installed library has no {module.__name__}.{name}"
    accepted = inspect.signature(function).parameters
    missing = [argument for argument in arguments if argument not in accepted]
    return f"the installed {module.__name__}.{name} has no {', '.join(missing)}" if missing else None
