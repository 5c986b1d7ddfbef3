"""The rules that keep the rooms apart, read off the source with `ast`: who may import whom, and
what a pure module may do.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("loraplex", "gateway", "worker", "shared")

DOORS = {
    "zmq": {"shared/link/sockets.py"},
    "vllm": {"worker/zygote.py", "worker/engine/vllm/*.py"},
    "aiobotocore": {"shared/stores/s3.py"},
    "botocore": {"shared/stores/s3.py"},
    "gcloud": {"shared/stores/gcs.py"},
    "azure": {"shared/stores/azure.py"},
    "aiohttp": {
        "gateway/http/*.py",
        "gateway/api/*.py",
        "gateway/admin/*.py",
        "gateway/dashboard/*.py",
        "gateway/routes.py",
        "gateway/supervisor/*.py",
        "shared/stores/s3.py",
        "shared/stores/gcs.py",
    },
    "prometheus_client": {"gateway/telemetry/*.py"},
    "yaml": {"shared/config/document.py"},
}
"""Third parties with one door: globs of the modules that are that door."""

FLOORS = {
    "loraplex": [
        {"__main__", "surface"},
        {"start"},
    ],
    "gateway": [
        {"__main__"},
        {"app"},
        {"routes"},
        {"dashboard"},
        {"admin", "api"},
        {"adapters", "dispatch"},
        {"routing", "telemetry"},
        {"cli"},
        {"fleet", "supervisor", "http", "accounts"},
    ],
    "worker": [
        {"zygote"},
        {"__main__"},
        {"agent"},
        {"boot", "commands", "heartbeat", "requests"},
        {"adapters", "peers", "validation"},
        {"engine", "disk", "session", "settings"},
    ],
    "shared": [
        {"config", "link", "stores", "supervision"},
        {"adapters", "runtime", "error_bodies"},
        {"errors", "averages", "endpoints"},
    ],
}
"""Rooms of each package, top floor first. A room imports rooms of the floors below it alone."""

MAX_MODULES = 16
"""In one folder, `__init__` counted: about as many names as a reader takes in at one look."""

PURE_THIRD_PARTIES = {"msgspec"}
IMPURE = {
    "asyncio",
    "time",
    "logging",
    "socket",
    "subprocess",
    "threading",
    "multiprocessing",
    "signal",
    "selectors",
    "secrets",
    "uuid",
}
RANDOM_TYPES = {"Random"}
"""Chance is an argument: a pure module may name the type of a generator, and never draw from the
module's own.
"""

# Each entry is (module, what it imports) and has its reason beside it.
ALLOWED = {
    ("shared/config/document.py", "yaml"): "parsing a text is pure, and YAML has one door",
}


class Module:
    """One source file, parsed."""

    def __init__(self, path: Path) -> None:
        self.path = path.relative_to(ROOT).as_posix()
        self.name = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.package = self.name.partition(".")[0]
        self.tree = ast.parse(path.read_text(encoding="utf-8"), self.path)
        self.kind = (ast.get_docstring(self.tree) or "").split(".")[0]

    def imports(self, typing_too: bool = True) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every import, those inside functions too; of `from a import b`
        both `a` and `a.b`.
        """
        skipped = (
            set()
            if typing_too
            else {id(n) for block in self._typing_blocks() for n in ast.walk(block)}
        )
        for node in ast.walk(self.tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: imports are absolute here"
                assert node.module is not None
                yield node.lineno, node.module
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)

    def _typing_blocks(self) -> Iterator[ast.If]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) in (
                "TYPE_CHECKING",
                "typing.TYPE_CHECKING",
            ):
                yield node


MODULES = [Module(p) for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
BY_NAME = {m.name: m for m in MODULES}
every = pytest.mark.parametrize("module", MODULES, ids=lambda m: m.path)
every_pure = pytest.mark.parametrize(
    "module", [m for m in MODULES if m.kind == "Pure"], ids=lambda m: m.path
)


def test_there_is_something_to_check() -> None:
    assert {m.package for m in MODULES} == set(PACKAGES) and len(MODULES) > 20


@every
def test_a_module_says_in_its_first_line_whether_it_is_pure_or_a_shell(module: Module) -> None:
    assert module.kind in ("Pure", "Shell")


@every
def test_gateway_and_worker_never_import_each_other_and_shared_imports_neither(
    module: Module,
) -> None:
    foreign = {
        "gateway": {"worker"},
        "worker": {"gateway"},
        "shared": {"gateway", "worker"},
        "loraplex": {"worker"},
    }[module.package]
    found = [
        f"{module.path}:{line}: {name}"
        for line, name in module.imports()
        if name.partition(".")[0] in foreign
    ]
    assert not found


@every
def test_what_users_import_from_loraplex_is_imported_by_no_room_and_its_start_by_any(
    module: Module,
) -> None:
    if module.package != "loraplex":
        names = {name for _, name in module.imports() if name.startswith("loraplex.")}
        assert all(name.startswith(("loraplex.start", "loraplex.__version__")) for name in names)


@every
def test_the_product_never_imports_tests_or_bench(module: Module) -> None:
    assert not [
        name
        for _, name in module.imports()
        if name.partition(".")[0] in ("tests", "bench", "examples")
    ]


@every
def test_every_third_party_comes_in_by_its_one_door(module: Module) -> None:
    found = [
        f"{module.path}:{line}: {name}"
        for line, name in module.imports()
        if not _is_door(module.path, name.partition(".")[0])
    ]
    assert not found


@every_pure
def test_a_pure_module_never_waits(module: Module) -> None:
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    protocols = {
        id(n)
        for c in ast.walk(module.tree)
        if isinstance(c, ast.ClassDef) and _is_protocol(c)
        for n in ast.walk(c)
    }
    found = [
        n.lineno for n in ast.walk(module.tree) if isinstance(n, waits) and id(n) not in protocols
    ]
    assert not found, f"{module.path}: lines {found}"


@every_pure
def test_a_pure_module_imports_no_clock_no_chance_no_log_and_no_socket(module: Module) -> None:
    found = [
        f"{module.path}:{line}: {name}"
        for line, name in module.imports()
        if name.partition(".")[0] in IMPURE
    ]
    assert not found


@every_pure
def test_a_pure_module_draws_from_no_generator_but_the_one_it_is_given(module: Module) -> None:
    found = [
        f"{module.path}:{n.lineno}"
        for n in ast.walk(module.tree)
        if isinstance(n, ast.ImportFrom) and n.module == "random"
    ]
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "random"
            and node.attr not in RANDOM_TYPES
        ):
            found.append(f"{module.path}:{node.lineno}: random.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "random.Random",
            "print",
            "open",
            "input",
            "eval",
            "exec",
        ):
            found.append(f"{module.path}:{node.lineno}: {ast.unparse(node.func)}()")
    assert not found


@every_pure
def test_a_pure_module_imports_only_pure_ones(module: Module) -> None:
    found = []
    names = list(module.imports(typing_too=False))
    for line, name in names:
        root = name.partition(".")[0]
        if root in PACKAGES:
            target = BY_NAME.get(name)
            if (
                target is not None
                and target.path.endswith("__init__.py")
                and any(n in BY_NAME for at, n in names if at == line and n != name)
            ):
                continue  # `from package import module` asks the package for nothing but the module
            if target is not None and target.kind != "Pure" and (module.path, name) not in ALLOWED:
                found.append(f"{module.path}:{line}: {name} is a shell")
        elif (
            root not in sys.stdlib_module_names
            and root not in PURE_THIRD_PARTIES
            and (module.path, root) not in ALLOWED
        ):
            found.append(f"{module.path}:{line}: {name}")
    assert not found


@pytest.mark.parametrize("glob", sorted({glob for doors in DOORS.values() for glob in doors}))
def test_a_door_that_is_named_exists(glob: str) -> None:
    assert any(ROOT.glob(glob))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_its_floor(package: str) -> None:
    rooms = {_room(m.name) for m in MODULES if m.package == package and _room(m.name)}
    assert rooms == {room for floor in FLOORS[package] for room in floor}


@every
def test_a_room_imports_only_rooms_of_the_floors_below_it(module: Module) -> None:
    floors = FLOORS[module.package]
    level = {room: number for number, floor in enumerate(floors) for room in floor}
    mine = _room(module.name)
    found = [
        f"{module.path}:{line}: {name} is not below {mine}"
        for line, name in module.imports(typing_too=False)
        if name.partition(".")[0] == module.package
        and (other := _room(name)) in level
        and mine
        and other != mine
        and level[other] <= level[mine]
    ]
    assert not found


def test_a_folder_holds_no_more_modules_than_a_reader_takes_in() -> None:
    folders = Counter(Path(m.path).parent.as_posix() for m in MODULES)
    assert {f: n for f, n in folders.items() if n > MAX_MODULES} == {}


def test_one_class_name_means_one_class() -> None:
    """Those of the benchmarks too: a reader who greps for a name finds one thing."""
    bench = [Module(p) for p in sorted((ROOT / "bench").rglob("*.py"))]
    where: dict[str, list[str]] = {}
    for module in [*MODULES, *bench]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(f"{module.path}:{node.lineno}")
    assert {name: places for name, places in where.items() if len(places) > 1} == {}


@pytest.mark.parametrize(("path", "name"), sorted(ALLOWED))
def test_an_exception_that_is_allowed_is_still_made(path: str, name: str) -> None:
    module = next((m for m in MODULES if m.path == path), None)
    assert module is not None and name in {n for _, n in module.imports()}


def _is_protocol(node: ast.ClassDef) -> bool:
    """A protocol may name what waits: its methods have no body."""
    return any(ast.unparse(base).startswith("Protocol") for base in node.bases)


def _is_door(path: str, third_party: str) -> bool:
    globs = DOORS.get(third_party)
    return globs is None or any(fnmatch.fnmatch(path, glob) for glob in globs)


def _room(name: str) -> str:
    """`api` of `gateway.api.schema`, `app` of `gateway.app`, "" of `gateway` itself."""
    return name.split(".")[1] if "." in name else ""
