"""Mutation testing: it changes a module in one random place at a time and runs the tests that should see it.

    python -m tests.mutation attn_n/dispatch/similar.py --count 200

A change that no test sees is printed with its line. All tests are run once to know which lines each of them enters. A
change is shown to those that enter its statement: first to quick ones, and to those that take other ways through the
module. A change within a function is made in a fork of a process that has collected the tests, any other one in a fork
that imports the changed module. No file is written, but for what `--keep` names.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import importlib.abc
import importlib.util
import itertools
import linecache
import os
import pickle
import random
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# By folder, the tests that may see a change.
TESTS = {
    "attn_n/call": (
        "errors", "edges", "registry", "masks", "call_cache", "transforms", "compile", "ops", "order", "sinks_a_row",
        "softmax", "adapt", "attention",
    ),
    "attn_n/dispatch": (
        "registry", "order", "call_cache", "threads", "errors", "masks", "edges", "transforms", "compile",
        "hopper_config", "attention",
    ),
    "attn_n/autograd": (
        "ops", "call_cache", "transforms", "edges", "dropout", "compile", "sinks_a_row", "bias_gradient", "masks",
        "adapt", "attention",
    ),
    "attn_n/sink": ("sink", "edges", "sinks_a_row", "ops", "masks", "finite_masks", "attention"),
    "attn_n/backends/adapt": (
        "adapt", "layouts", "masks", "finite_masks", "edges", "libraries", "registry", "sinks_a_row", "call_cache",
        "attention",
    ),
}  # fmt: skip
# All but tests in processes of their own, and those under Triton's interpreter, which take minutes.
TESTS_LEFT = "not of_a_process and (not triton or registry or order or hopper_config or sink or ops)"
SOURCE_IS_READ = ("attn_n/sink/kernels.py",)  # by Triton, which does not run the code
SAY = functools.partial(print, file=os.fdopen(os.dup(1), "w"), flush=True)
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
            if not isinstance(getattr(node.value, "value", ...), bool | None):  # False is as good as None
                yield node, "value", ast.Constant(None)
        elif isinstance(node, ast.Call) and node.keywords and all(each.arg for each in node.keywords):
            for place, keyword in enumerate(node.keywords):
                if keyword.arg != "strict":  # which checks what holds
                    yield node, "keywords", node.keywords[:place] + node.keywords[place + 1 :]


def _of_types(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what changes nothing: annotations, and the text of errors."""
    for field in ("annotation", "returns"):
        hint = getattr(node, field, None)
        if hint is not None:
            yield from ast.walk(hint)
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        yield from ast.walk(node)


class Change(NamedTuple):
    """A changed module: the line, what it becomes there, the lines of the statement, the code, and the source."""

    line: int
    what: str
    statement: range
    code: CodeType
    source: str


def mutants(source: str, path: str, count: int, seed: int) -> list[Change]:
    """Return at most `count` changes."""
    tree = ast.parse(source)
    statements, all_changes, made = _statements(tree), list(changes(tree)), []
    for number in sorted(random.Random(seed).sample(range(len(all_changes)), min(count, len(all_changes)))):
        node, field, value = all_changes[number]
        before, kept = ast.unparse(node), getattr(node, field)
        setattr(node, field, value)
        after = ast.unparse(node)
        with contextlib.suppress(SyntaxError, ValueError):
            code = compile(ast.fix_missing_locations(tree), path, "exec")
            if after != before:
                what = f"{before.splitlines()[0]}  ->  {after.splitlines()[0]}"
                if isinstance(node, ast.Call):
                    dropped, *_ = [each for each in kept if each not in node.keywords]
                    what = f"{ast.unparse(node.func)}(...) without {ast.unparse(dropped)}"
                line = getattr(node, "lineno", 0)
                made.append(Change(line, what, statements[id(node)], code, ast.unparse(tree)))
        setattr(node, field, kept)
    return made


def _statements(tree: ast.Module) -> dict[int, range]:
    """Return by the id of each node the lines of its statement, without those of the statement's body."""
    found = {}
    for statement in ast.walk(tree):  # which comes to the inner ones later
        if isinstance(statement, ast.stmt):
            body = getattr(statement, "body", None)
            end = body[0].lineno - 1 if body else statement.end_lineno or 0
            lines = range(statement.lineno, max(statement.lineno, end) + 1)
            found.update({id(node): lines for node in ast.walk(statement)})
    return found


class Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import modules from code."""

    def __init__(self, codes: dict[str, CodeType]) -> None:
        self.codes = {".".join(Path(path).with_suffix("").parts): code for path, code in codes.items()}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        code = self.codes.get(name)
        return None if code is None else importlib.util.spec_from_file_location(name, code.co_filename, loader=self)

    def exec_module(self, module: Any) -> None:
        exec(self.codes[module.__name__], module.__dict__)


def spent() -> float:
    """Return the seconds of CPU time of this process and of those that it waited for: others do not slow it down."""
    return sum(os.times()[:4])


def forked(work: Callable[[], Any], seconds: float = 7200) -> Any:
    """Return the result of `work` in a forked process, or None if that ends in another way or takes too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        with contextlib.suppress(BaseException), open(writing, "wb") as pipe:
            pickle.dump(work(), pipe)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(result) if result else None


class Test(NamedTuple):
    name: str
    seconds: float
    lines: dict[str, set[int]]  # by the path of a module


def choose(
    tests: Sequence[Test], path: str, lines: range | None, seconds: float, killed: Counter[str]
) -> tuple[list[str], float]:
    """Return the names of tests that enter these lines of the module (or any), and the seconds that they take.

    Those that saw changes before come first, then quick ones, and those that take another way through the module.
    """
    ranks = Counter[frozenset[int]]()
    order = []
    for test in sorted(tests, key=lambda test: test.seconds):
        if path in test.lines and (lines is None or not test.lines[path].isdisjoint(lines)):
            way = frozenset(test.lines[path])
            ranks[way] += 1
            order.append((-killed[test.name], ranks[way] * test.seconds, test))
    chosen, total = [], 0.0
    for _, _, test in sorted(order, key=lambda each: each[:2]):
        if total < seconds:
            chosen.append(test.name)
            total += test.seconds
    return chosen, total


def run(items: Sequence[pytest.Item]) -> str:
    """Run tests, and return the name of the first one that fails, or none."""
    for item, following in itertools.zip_longest(items, items[1:]):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            return item.nodeid
    return ""


def traced(items: Sequence[pytest.Item]) -> list[Test]:
    """Run each test and note which lines of the modules it enters, torch.compile's tracing of them included."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    paths = [path for folder in TESTS for path in (ROOT / folder).glob("*.py")]
    entered: dict[str, set[int]] = {str(path.relative_to(ROOT)): set() for path in paths}
    entered |= {str(ROOT / path): lines for path, lines in entered.items()}
    calls = Counter[CodeType]()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        lines = entered.get(frame.f_code.co_filename)
        if lines is None or (event == "call" and calls[frame.f_code] > 20):  # to look at thousands would take minutes
            return None
        calls[frame.f_code] += event == "call"
        lines.add(frame.f_lineno)
        return trace

    def starts_line(translator: Any, line: int) -> None:
        if translator.f_code.co_filename in entered:
            entered[translator.f_code.co_filename].add(line)
        started(translator, line)

    started = InstructionTranslatorBase.starts_line
    InstructionTranslatorBase.starts_line = starts_line  # type: ignore[method-assign]
    threading.settrace(trace)
    tests = []
    for item, following in itertools.zip_longest(items, items[1:]):
        for lines in entered.values():
            lines.clear()
        calls.clear()
        start = spent()
        sys.settrace(trace)
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        sys.settrace(None)
        if item.session.testsfailed:
            SAY(f"{item.nodeid} fails without a change")
            item.session.testsfailed = 0
        else:
            lines_of = {path: set(lines) for path, lines in entered.items() if lines and not Path(path).is_absolute()}
            tests.append(Test(item.nodeid, spent() - start, lines_of))
    return tests


def of_functions(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """Return the code of functions that differs; None if the change is not within a function."""
    pairs = list(_pairs(old, new))
    if any(a.co_freevars != b.co_freevars or (not a.co_flags & CO_OPTIMIZED and _own(a) != _own(b)) for a, b in pairs):
        return None
    return [(a, b) for a, b in pairs if a.co_flags & CO_OPTIMIZED and a != b]


def _pairs(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    yield old, new
    for pair in zip(*([x for x in code.co_consts if isinstance(x, CodeType)] for code in (old, new)), strict=False):
        yield from _pairs(*pair)


def _own(code: CodeType) -> tuple[object, ...]:
    return code.co_code, code.co_names, [repr(x) for x in code.co_consts if not isinstance(x, CodeType)]


class Session:
    """The plugin of a run of pytest that exchanges the code of functions."""

    def __init__(
        self, codes: dict[str, CodeType], found: dict[str, list[Change]], seconds: float, keep: Path | None
    ) -> None:
        self.codes, self.found, self.seconds, self.keep = codes, found, seconds, keep
        self.tests: list[Test] = pickle.loads(keep.read_bytes()) if keep is not None and keep.exists() else []
        self.seen: dict[tuple[str, int], bool] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert not session.testsfailed, "the tests cannot be collected"
        items = {item.nodeid: item for item in session.items}
        known = {test.name for test in self.tests}
        self.tests += forked(lambda: traced([item for item in session.items if item.nodeid not in known]))
        if self.keep is not None:
            self.keep.write_bytes(pickle.dumps(self.tests))
        self.tests = [test for test in self.tests if test.name in items]
        SAY(f"{len(self.tests)} tests took {sum(test.seconds for test in self.tests):.0f} s")
        functions: dict[int, list[FunctionType]] = defaultdict(list)
        caches = []
        for x in gc.get_objects():
            if isinstance(x, FunctionType):
                functions[id(x.__code__)].append(x)
            elif isinstance(x, functools._lru_cache_wrapper) and x.__module__.startswith("attn_n"):
                caches.append(x)
        gc.freeze()

        def changed(exchanged: list[tuple[CodeType, CodeType]], names: list[str]) -> str:
            for old, new in exchanged:
                for function in functions[id(old)]:
                    function.__code__ = new
            for cache in caches:
                cache.cache_clear()
            return run([items[name] for name in names])

        for path, found in self.found.items():
            if path in SOURCE_IS_READ:
                continue
            SAY(f"{path}, {len(found)} changes")
            killed = Counter[str]()
            while by := forked(functools.partial(changed, [], choose(self.tests, path, None, 60, killed)[0])):
                SAY(f"{by} fails after others without a change")
                self.tests = [test for test in self.tests if test.name != by]
            for place, change in enumerate(found):
                exchanged = of_functions(self.codes[path], change.code)
                names, seconds = choose(self.tests, path, change.statement, self.seconds, killed)
                # What runs during the import alone is changed there.
                if names and exchanged is not None and any(functions[id(old)] for old, _ in exchanged):
                    by = forked(functools.partial(changed, exchanged, names), 3 * seconds + 20)
                    killed[by] += 1
                    self.seen[path, place] = by != ""
                    if by == "":
                        SAY(f"  {path}:{change.line}: {change.what}  ({len(names)} tests)")
        return True


class Only:
    """The plugin of a run of pytest that runs some of the tests, in their order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        of_names = {item.nodeid: item for item in items}
        items[:] = [of_names[name] for name in self.names]


def run_pytest(files: Sequence[str], plugin: object, codes: dict[str, CodeType]) -> int:
    sys.meta_path.insert(0, Modules(codes))
    options = ["-x", "-q", "-m", "not slow", "-k", TESTS_LEFT]
    options += [part for name in ("cacheprovider", "xdist", "randomly") for part in ("-p", f"no:{name}")]
    return int(pytest.main([*options, *files], plugins=[plugin]))


def anew(path: str, change: Change, names: Sequence[str]) -> int:
    """Run tests with a changed module, whose source functions of `inspect` see as well."""
    file = str(ROOT / path)
    linecache.cache[file] = (len(change.source), None, change.source.splitlines(keepends=True), file)
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    return run_pytest(files, Only(names), {path: compile(change.source, file, "exec")})


def in_session(
    files: Sequence[str], codes: dict[str, CodeType], found: dict[str, list[Change]], seconds: float, keep: Path | None
) -> tuple[list[Test], dict[tuple[str, int], bool]]:
    session = Session(codes, found, seconds, keep)
    run_pytest(files, session, codes)
    return session.tests, session.seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("paths", nargs="+", metavar="MODULE.py")
    parser.add_argument("--count", type=int, default=200, help="changes of each module (200)")
    parser.add_argument("--seconds", type=float, default=8, help="of tests for each change (8)")
    parser.add_argument("--tests", nargs="+", help="masks for tests/test_masks.py; as listed in tests/mutation.py")
    parser.add_argument("--lines", type=int, nargs="+", help="changes of these lines alone")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="for what each test enters, which takes minutes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    missed = 0
    for tests, paths in itertools.groupby(
        options.paths, lambda path: next(TESTS[str(each)] for each in Path(path).parents if str(each) in TESTS)
    ):
        files = [f"tests/test_{name}.py" for name in options.tests or tests]
        sources = {path: (ROOT / path).read_text() for path in paths}
        codes = {path: compile(source, path, "exec") for path, source in sources.items()}
        found = {path: mutants(source, path, options.count, options.seed) for path, source in sources.items()}
        if options.lines:
            found = {path: [each for each in of_path if each.line in options.lines] for path, of_path in found.items()}
        measured, seen = forked(functools.partial(in_session, files, codes, found, options.seconds, options.keep))
        for path, changes_of_path in found.items():
            killed = 0
            for place, change in enumerate(changes_of_path):
                if (path, place) not in seen:
                    names, seconds = choose(measured, path, None, options.seconds, Counter())
                    status = forked(functools.partial(anew, path, change, names), 3 * seconds + 60)
                    seen[path, place] = status != 0
                    if status == 0:
                        SAY(f"  {path}:{change.line}: {change.what}  ({len(names)} tests)")
                killed += seen[path, place]
            missed += len(changes_of_path) - killed
            SAY(f"{path}: {killed} of {len(changes_of_path)} killed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
