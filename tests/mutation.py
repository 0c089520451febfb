"""Mutation testing: it changes a module in one random place at a time and runs the tests that should see it.

    python -m tests.mutation attn_n/dispatch/similar.py --count 200

A change that no test sees is printed with its line. Each change runs in a forked process that gets the module from
memory, so that no file is written and torch is imported once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parent.parent

# By module or folder, the tests that are to see a change, the quickest first.
TESTS = {
    "attn_n/call/autocast.py": ("call_cache", "transforms", "attention"),
    "attn_n/call/jagged.py": ("masks", "errors", "attention"),
    "attn_n/call/transforms.py": ("transforms", "ops", "call_cache"),
    "attn_n/call": ("errors", "edges", "registry", "masks", "call_cache", "attention"),
    "attn_n/dispatch/order.py": ("registry", "order", "call_cache"),
    "attn_n/dispatch/similar.py": ("call_cache", "errors"),
    "attn_n/dispatch/call_cache.py": ("call_cache", "threads"),
    "attn_n/dispatch/run.py": ("call_cache", "masks", "edges", "errors", "compile"),
    "attn_n/dispatch": ("call_cache", "registry", "threads", "errors"),
    "attn_n/autograd/flops.py": ("compile",),
    "attn_n/autograd": ("call_cache", "ops", "transforms", "edges", "dropout", "attention"),
    "attn_n/sink": ("sink", "edges", "attention"),
    "attn_n/backends/adapt": ("layouts", "masks", "finite_masks", "attention", "libraries"),
}
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, object]]:
    """Yield a node, the name of one of its fields, and another value for it."""
    hints = {id(x) for node in ast.walk(tree) for x in _of_types(node)}
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Compare):
            for other in COMPARISONS.get(type(node.ops[0]), ()):
                yield node, "ops", [other(), *node.ops[1:]]
        elif isinstance(node, ast.BoolOp):
            yield node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And()
            for place in range(len(node.values)):
                yield node, "values", node.values[:place] + node.values[place + 1 :]
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield node, "op", OPERATORS[type(node.op)]()
        elif isinstance(node, ast.IfExp | ast.If | ast.While):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, "value", not node.value if isinstance(node.value, bool) else node.value + 1
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node, "value", ast.Constant(None)
        elif isinstance(node, ast.Call) and node.keywords and all(each.arg for each in node.keywords):
            for place in range(len(node.keywords)):
                yield node, "keywords", node.keywords[:place] + node.keywords[place + 1 :]


def _of_types(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what changes nothing: annotations, and the text of errors."""
    for field in ("annotation", "returns"):
        hint = getattr(node, field, None)
        if hint is not None:
            yield from ast.walk(hint)
    if isinstance(node, ast.JoinedStr):
        yield from ast.walk(node)


def mutants(source: str, count: int, seed: int) -> list[tuple[int, str, CodeType]]:
    """Return the line, what it becomes, and the compiled module of at most `count` changes."""
    total = sum(1 for _ in changes(ast.parse(source)))
    made = []
    for number in sorted(random.Random(seed).sample(range(total), min(count, total))):
        tree = ast.parse(source)
        node, field, value = next(change for place, change in enumerate(changes(tree)) if place == number)
        before = ast.unparse(node)
        setattr(node, field, copy.deepcopy(value))
        if ast.unparse(node) == before:
            continue
        with contextlib.suppress(Exception):
            code = compile(ast.fix_missing_locations(tree), "mutant", "exec")
            made.append((getattr(node, "lineno", 0), f"{before}  ->  {ast.unparse(node)}", code))
    return made


class _Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Give the changed code for one module."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        self.module, self.path, self.code = module, path, code

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.module else None

    def exec_module(self, module: object) -> None:
        exec(self.code, module.__dict__)


def survives(module: str, path: Path, code: CodeType, tests: Sequence[str], seconds: float) -> bool:
    """Run the tests in a forked process; a change that hangs is seen."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        sys.meta_path.insert(0, _Mutant(module, path, code))
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        import pytest

        status = 1
        with contextlib.suppress(BaseException):
            status = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        os._exit(int(status != 0))
    timer = threading.Timer(seconds, lambda: os.killpg(child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("paths", nargs="+", metavar="MODULE.py")
    parser.add_argument("--count", type=int, default=200, help="changes of each module (200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        import hypothesis  # noqa: F401
        import pytest  # noqa: F401
        import torch._dynamo  # noqa: F401
        import triton  # noqa: F401
    missed = 0
    for path in options.paths:
        names = next(TESTS[each] for each in (path, *map(str, Path(path).parents)) if each in TESTS)
        tests = [str(ROOT / f"tests/test_{name}.py") for name in names]
        module = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
        source, start = (ROOT / path).read_text(), time.monotonic()
        assert survives(module, ROOT / path, compile(source, path, "exec"), tests, 3600), f"{path}: its tests fail"
        seconds = 2 * (time.monotonic() - start) + 20
        made = mutants(source, options.count, options.seed)
        survivors = [(line, what) for line, what, code in made if survives(module, ROOT / path, code, tests, seconds)]
        missed += len(survivors)
        print(f"{path}: {len(made) - len(survivors)} of {len(made)} killed", flush=True)
        for line, what in survivors:
            print(f"  {path}:{line}: {what}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
