"""The rules that keep the rooms apart, checked on the source with `ast`: who may import whom, and
what a pure module may do.
"""

from __future__ import annotations

import ast
import fnmatch
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
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
    "huggingface_hub": {"shared/stores/hub_client.py", "worker/validation/base_model.py"},
    "aiohttp": {
        "gateway/http/*.py",
        "gateway/api/*.py",
        "gateway/admin/*.py",
        "gateway/batches/batch_api.py",
        "gateway/dashboard/*.py",
        "gateway/routes.py",
        "gateway/supervisor/*.py",
        "shared/stores/s3.py",
        "shared/stores/gcs.py",
        "worker/engine/vllm/tenants/media_addresses.py",
    },
    "prometheus_client": {"gateway/telemetry/*.py"},
    "opentelemetry": {"gateway/telemetry/traces.py"},
    "yaml": {"shared/config/document/yaml_document.py"},
}
"""Third-party packages that few modules may import -> globs of those modules."""

FLOORS = {
    "loraplex": [
        {"__main__", "surface"},
        {"start"},
    ],
    "gateway": [
        {"__main__"},
        {"app"},
        {"reload", "routes"},
        {"batches", "dashboard"},
        {"admin", "api"},
        {"adapters", "dispatch"},
        {"cli", "routing", "telemetry"},
        {"advisor", "fleet", "supervisor", "http", "accounts"},
    ],
    "worker": [
        {"zygote"},
        {"__main__"},
        {"agent"},
        {
            "boot",
            "gateways",
            "heartbeat",
            "loop_watch",
            "probes",
            "requests",
        },
        {"adapters", "peers", "validation"},
        {"engine", "disk", "session", "settings"},
    ],
    "shared": [
        {"config", "link", "stores", "supervision"},
        {"adapters", "runtime", "error_bodies"},
        {
            "errors",
            "averages",
            "api_endpoints",
            "held_bytes",
            "lenient_values",
            "option_numbers",
            "vllm_versions",
        },
    ],
}
"""The rooms of each package, top floor first. A room may import only rooms of the floors
below it.
"""

MAX_FLOORS = 8
MAX_MODULES = 15
"""Modules in one folder, `__init__` counted: about as many names as a reader takes in at
one look.
"""

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
"""Chance is an argument. A pure module may name the type of a generator, but must not draw from the
module's own.
"""

# Each entry is (module, what it imports) and has its reason beside it.
ALLOWED = {
    (
        "shared/config/document/yaml_document.py",
        "yaml",
    ): "parsing a text is pure, and YAML has one door",
    (
        "shared/config/llm.py",
        "shared.config.settings_file",
    ): "LLMConfig.from_file is Ray's name for reading a file; it is imported when it is called",
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
        """(line, dotted name) of every import, even inside functions. `from a import b` gives both
        `a` and `a.b`.
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
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def _of_each(modules: list[Module], rule: Callable[[Module], None]) -> Callable[[], None]:
    """One test of a rule, which names every module that breaks it. A test for each module would
    cost more than what it checks.
    """

    def test() -> None:
        broken = {}
        for module in modules:
            try:
                rule(module)
            except AssertionError as exc:
                broken[module.path] = str(exc)
        assert broken == {}

    test.__name__ = rule.__name__
    return test


def every(rule: Callable[[Module], None]) -> Callable[[], None]:
    return _of_each(MODULES, rule)


def every_pure(rule: Callable[[Module], None]) -> Callable[[], None]:
    return _of_each([m for m in MODULES if m.kind == "Pure"], rule)


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


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_few_floors(package: str) -> None:
    assert len(FLOORS[package]) <= MAX_FLOORS


@pytest.mark.parametrize("package", PACKAGES)
def test_the_sub_packages_of_a_room_import_each_other_in_no_circle(package: str) -> None:
    """A folder and those inside it are one room. Two folders side by side are not."""
    arrows: dict[str, set[str]] = {}
    for module in (m for m in MODULES if m.package == package):
        mine = Path(module.path).parent.parts
        for _, name in module.imports(typing_too=False):
            target = BY_NAME.get(name)
            other = Path(target.path).parent.parts if target is not None else mine
            pairs = zip(mine, other, strict=False)
            shared = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
            if 0 < shared < min(len(mine), len(other)):
                arrow = arrows.setdefault("/".join(mine[: shared + 1]), set())
                arrow.add("/".join(other[: shared + 1]))
    TopologicalSorter(arrows).prepare()  # raises CycleError with the circle


def test_a_folder_holds_no_more_modules_than_a_reader_takes_in() -> None:
    others = [p.relative_to(ROOT) for p in sorted([*ROOT.glob("bench/**/*.py"), *TESTS])]
    folders = Counter(p.parent.as_posix() for p in (*(Path(m.path) for m in MODULES), *others))
    assert {f: n for f, n in folders.items() if n > MAX_MODULES} == {}


def test_the_unit_tests_stand_in_the_folders_of_what_they_test() -> None:
    folders = {p.parent.relative_to(ROOT / "tests" / "unit") for p in TESTS if "unit" in p.parts}
    assert [str(f) for f in folders if not (ROOT / f).is_dir() and f.name != "conformance"] == []


def test_one_name_of_a_type_means_one_type() -> None:
    """A class or an alias. The benchmarks are included: a reader who greps for a name finds one
    thing.
    """
    bench = [Module(p) for p in sorted((ROOT / "bench").rglob("*.py"))]
    where: dict[str, list[str]] = {}
    for module in [*MODULES, *bench]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.stmt) and (name := _type_name(node)) is not None:
                where.setdefault(name, []).append(f"{module.path}:{node.lineno}")
    assert {name: places for name, places in where.items() if len(places) > 1} == {}


@pytest.mark.parametrize(("path", "name"), sorted(ALLOWED))
def test_an_exception_that_is_allowed_is_still_made(path: str, name: str) -> None:
    module = next((m for m in MODULES if m.path == path), None)
    assert module is not None and name in {n for _, n in module.imports()}


def _type_name(node: ast.stmt) -> str | None:
    """The name of the class or type alias that this statement makes."""
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
        return ast.unparse(node.target)
    if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
        return ast.unparse(node.targets[0])
    return None


def _is_protocol(node: ast.ClassDef) -> bool:
    """A protocol may name what waits, because its methods have no body."""
    return any(ast.unparse(base).startswith("Protocol") for base in node.bases)


def _is_door(path: str, third_party: str) -> bool:
    globs = DOORS.get(third_party)
    return globs is None or any(fnmatch.fnmatch(path, glob) for glob in globs)


def _room(name: str) -> str:
    """`api` of `gateway.api.body.schema`, `app` of `gateway.app`, "" of `gateway` itself."""
    return name.split(".")[1] if "." in name else ""
