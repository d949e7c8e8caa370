"""Imports point downward only, and the core uses no socket, no clock and no ambient randomness (DESIGN section 2)."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import solyd_swarm

PACKAGE = "solyd_swarm"
ROOT = Path(solyd_swarm.__file__).parent

RANKS = {
    "errors": 0,
    "core": 1,
    "net": 2,
    "discovery": 2,
    "store": 2,
    "simulation": 2,
    # What swarm and node are built of, beside the protocol.
    "payload": 3,
    "pending": 3,
    "runtime": 3,
    "lifetime": 3,
    "interpreter": 3,
    "interrupts": 3,
    "terminal": 3,
    "emitter": 3,
    "options": 3,
    "ticket": 3,
    "message": 3,
    "inbox": 3,
    "outbox": 3,
    "home": 3,
    "delivery": 3,
    "departure": 3,
    "lagging": 3,
    "neighbors": 3,
    "finding": 4,
    "node": 4,
    "swarm": 5,
    "pubsub": 6,
    "": 7,  # the package itself: what users import
    "pipe": 8,
    "doctor": 8,
    "bootstrap_command": 8,
    "cli": 8,
    "__main__": 9,
}
"""By the first name under the package. An import must not lead to a higher rank."""

HELPERS = {name for name, rank in RANKS.items() if rank == 3}
HELPERS_MAY_IMPORT = {"errors", "core", "net.resolve", *HELPERS}

NOT_IN_CORE = {
    *("asyncio", "time", "socket", "os", "secrets", "threading", "ssl", "select", "selectors", "signal", "subprocess", "multiprocessing"),
    *("concurrent", "queue", "sched", "sqlite3", "tempfile", "shutil", "pathlib", "uuid", "contextvars", "_thread", "nacl.utils"),
}
CLOCKS = {"now", "utcnow", "today"}
ORDERED_BY = {"sorted", "set", "frozenset", "len", "sum", "min", "max", "any", "all"}  # the order of what they are given is lost
SET_METHODS = {"union", "intersection", "difference", "symmetric_difference"}


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module's name below the package; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in files()}


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of all that is imported, wherever it is written; of names imported from a package, the modules."""
    inside = [PACKAGE, *filter(None, module.split("."))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + is_package] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{start}.{alias.name}"
                yield node.lineno, full if start.split(".")[0] != PACKAGE or below(full) in MODULES else start
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield node.lineno, resolve_name(name, ".".join(inside if is_package else inside[:-1]))
                case _:
                    yield node.lineno, "a name that is only known when it runs"


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


def below(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".")


def top(name: str) -> str:
    return name.split(".")[0]


def check_arrows(tree: ast.AST, module: str, *, is_package: bool = False) -> list[str]:
    if top(module) not in RANKS:
        return [f"{module} has no rank: give it one in {Path(__file__).name}"]
    wrong = []
    for line, name in imports(tree, module, is_package=is_package):
        if top(name) != PACKAGE:
            continue
        target = below(name)
        if RANKS.get(top(target), 99) > RANKS[top(module)]:
            wrong.append(f"line {line}: {module} imports {name}, which lies above it")
        elif top(module) in HELPERS and target not in HELPERS_MAY_IMPORT and top(target) not in HELPERS_MAY_IMPORT:
            wrong.append(f"line {line}: {module} imports {name}, and should know nothing of it")
    return wrong


def check_core(tree: ast.AST, module: str) -> list[str]:
    wrong = []
    modules_called_random = set()
    for line, name in imports(tree, module, is_package=False):
        if any(name == banned or name.startswith(banned + ".") for banned in NOT_IN_CORE):
            wrong.append(f"line {line}: imports {name}")
        elif name.startswith("random.") and name != "random.Random":
            wrong.append(f"line {line}: imports {name}: randomness is handed over")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules_called_random |= {alias.asname or alias.name for alias in node.names if alias.name == "random"}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules_called_random
            and node.attr != "Random"
        ):
            wrong.append(f"line {node.lineno}: uses random.{node.attr}: randomness is handed over")
        elif isinstance(node, ast.Call) and called(node) == "Random" and not node.args:
            wrong.append(f"line {node.lineno}: makes an unseeded Random")
        elif isinstance(node, ast.Call) and called(node) in CLOCKS and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if (owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else "") in (
                "datetime",
                "date",
            ):
                wrong.append(f"line {node.lineno}: asks a clock: now is passed in")
    return wrong


def is_set(node: ast.expr, known: set[str]) -> bool:
    match node:
        case ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name in known
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if method in SET_METHODS or method == "copy":
            return is_set(owner, known)
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor(), right=right):
            return is_set(left, known) or is_set(right, known)
        case ast.IfExp(body=body, orelse=orelse):
            return is_set(body, known) or is_set(orelse, known)
    return False


def known_sets(scope: ast.AST) -> set[str]:
    """Names and attributes that are only ever assigned sets in a scope, or annotated as such."""
    is_known: dict[str, bool] = {}
    for node in ast.walk(scope):
        targets: list[ast.expr] = []
        verdict = False
        if isinstance(node, ast.Assign):
            targets, verdict = node.targets, is_set(node.value, set())
        elif isinstance(node, ast.AnnAssign):
            annotation = node.annotation.value if isinstance(node.annotation, ast.Subscript) else node.annotation
            targets, verdict = [node.target], isinstance(annotation, ast.Name) and annotation.id in ("set", "frozenset", "Set")
        elif isinstance(node, ast.For):
            targets = [node.target]
        for target in targets:
            if isinstance(target, (ast.Name, ast.Attribute)):
                name = target.id if isinstance(target, ast.Name) else target.attr
                is_known[name] = is_known.get(name, True) and verdict
    return {name for name, verdict in is_known.items() if verdict}


def check_sets(tree: ast.AST) -> list[str]:
    """Iterations over sets whose order may reach the wire: what is found by looks alone, without types."""
    wrong: list[str] = []

    def visit(node: ast.AST, known: set[str], *, loses_order: bool) -> None:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            known = known | known_sets(node)
        iterated: list[ast.expr] = []
        if isinstance(node, (ast.For, ast.AsyncFor)):
            iterated = [node.iter]
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)) and not loses_order:
            iterated = [generator.iter for generator in node.generators]
        elif isinstance(node, ast.Starred):
            iterated = [node.value] if not loses_order else []
        elif isinstance(node, ast.Call) and called(node) in (
            "list",
            "tuple",
            "enumerate",
            "iter",
            "zip",
            "map",
            "filter",
            "join",
            "extend",
            "fromkeys",
        ):
            iterated = node.args if not loses_order else []
        elif isinstance(node, ast.Call) and called(node) in ("choice", "sample", "shuffle", "choices"):
            iterated = node.args[:1]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pop" and not node.args:
            iterated = [node.func.value]
        wrong.extend(f"line {each.lineno}: iterates the set {ast.unparse(each)}: sort it" for each in iterated if is_set(each, known))
        lost = isinstance(node, ast.Set) or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ORDERED_BY)
        for child in ast.iter_child_nodes(node):
            visit(child, known, loses_order=lost)

    visit(tree, set(), loses_order=False)
    return wrong


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    assert check_arrows(ast.parse(path.read_text("utf-8")), name_of(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda path: path.name)
def test_core_is_a_state_machine(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert check_core(tree, name_of(path)) == []
    assert check_sets(tree) == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("core.overlay", "from ..net import channel"),
        ("core.overlay", "from .. import net"),
        ("core.overlay", "def f():\n    import solyd_swarm.store.identity"),
        ("core.overlay", "import importlib\nimportlib.import_module('solyd_swarm.net')"),
        ("core.overlay", "import importlib\nimportlib.import_module('..net')"),
        ("core.overlay", "from .. import pubsub"),
        ("net.channel", "if TYPE_CHECKING:\n    from ..node import Node"),
        ("discovery.mdns", "from ..payload import encode"),
        ("node", "async def f():\n    from .swarm import Swarm"),
        ("node", "from solyd_swarm import Swarm"),
        ("errors", "from .core import keys"),
        ("pending", "from .net import channel"),
        ("runtime", "from .node import Node"),
        ("swarm", "from . import cli"),
        ("no_rank", "import ast"),
    ],
)
def test_wrong_arrows_are_found(module: str, code: str) -> None:
    assert len(check_arrows(ast.parse(code), module)) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("net.channel", "from ..core import wire\nfrom ..errors import SwarmError\nfrom . import noise\nimport asyncio"),
        ("runtime", "from .net import resolve\nfrom .net.resolve import lookup\nfrom .pending import Pending"),
        ("swarm", "from .node import Node\nfrom . import payload"),
        ("cli", "from . import pubsub\nfrom solyd_swarm import Swarm"),
        ("", "from .swarm import pubsub"),
    ],
)
def test_right_arrows_pass(module: str, code: str) -> None:
    assert check_arrows(ast.parse(code), module, is_package=module == "") == []


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "def f():\n    from os import urandom",
        "import concurrent.futures",
        "from random import choice",
        "import random\nrandom.shuffle([])",
        "import random as r\nr.random()",
        "import random\nrng = random.Random()",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.utcnow()",
    ],
)
def test_ambience_is_found(code: str) -> None:
    assert check_core(ast.parse(code), "core.overlay")


def test_injected_randomness_passes() -> None:
    code = "import random\nfrom random import Random\ndef f(rng: random.Random, other: Random):\n    rng.choice([1])\n    random.Random(5)"
    assert check_core(ast.parse(code), "core.overlay") == []


@pytest.mark.parametrize(
    "code",
    [
        "for x in {1, 2}: pass",
        "for x in set(y): pass",
        "[x for x in frozenset(y)]",
        "list(set(y))",
        "[*{1, 2}]",
        "for x in set(a) - b: pass",
        "for x in set(a).union(b): pass",
        "def f():\n    s = set()\n    for x in s: pass",
        "class C:\n    def __init__(self):\n        self.s: set[int] = set()\n    def f(self):\n        for x in self.s: pass",
        "class C:\n    s: set[int]\n    def f(self):\n        return self.s.pop()",
        "rng.choice(list(set(y)))",
        "b''.join(x for x in set(y))",
    ],
)
def test_iterated_sets_are_found(code: str) -> None:
    assert check_sets(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "for x in sorted({1, 2}): pass",
        "sorted(x for x in set(y))",
        "any(x for x in {1, 2})",
        "{x for x in set(y)}",
        "{*{1}, *set(y)}",
        "x in {1, 2}",
        "def f():\n    s = set()\n    s = [1]\n    for x in s: pass",
        "for x in dict.fromkeys(y): pass",
        "self.queue.pop()",
    ],
)
def test_ordered_iterations_pass(code: str) -> None:
    assert check_sets(ast.parse(code)) == []
