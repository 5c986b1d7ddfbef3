"""README and docs/ against the tree: links, length, sentences, and every name that they give."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from gateway.api.body import bounds, scan
from gateway.cli.main import _parser
from gateway.http import aiohttp_connection
from gateway.telemetry import collectors, metric_definitions, prometheus
from shared.api_endpoints import MOST_COUNTED_BYTES
from shared.config import reload
from shared.config.aliases import AliasConfig
from shared.config.deployment import AutoscalingConfig, AutoscalingPolicy, BottleneckConfig
from shared.config.gateway import (
    GatewayConfig,
    HTTPConfig,
    LinkConfig,
    RequestBoundsConfig,
    RoutingPolicy,
    TLSConfig,
    TracesConfig,
)
from shared.config.llm_sections import LoraConfig, StoreConfig
from shared.errors import LoraplexError
from tests.test_architecture import FLOORS
from tests.unit.docs.prose import anchors, links, prose

ROOT = Path(__file__).resolve().parents[3]
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
MANUALS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))
NOTES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs/notes").glob("*.md"))
EVERY_PAGE = [p for p in ROOT_PAGES if (ROOT / p).exists()] + MANUALS + NOTES
TODAY = ["README.md", "CONTRIBUTING.md", *MANUALS]
"""Pages that speak of the tree as it is; notes and the changelog speak of their own day."""
OPERATOR_PAGES = [
    "README.md",
    *(f"docs/{n}.md" for n in ("ADAPTERS", "API", "CHART", "CONFIG", "DEPLOY", "OPERATIONS")),
    *(f"docs/{n}.md" for n in ("SCALING", "SECURITY", "UI")),
]
ENGINEER_PAGES = [
    f"docs/{n}.md"
    for n in ("ARCHITECTURE", "FIRST-DAY", "PERFORMANCE", "PROTOCOL", "RELIABILITY", "ROUTING")
]
MAX_LINES = {"README.md": 150, "docs/ROUTING.md": 150, "docs/PERFORMANCE.md": 150}
LONG_WORDS = 25
"""A sentence of more words holds more than one idea."""
MAX_MEAN_WORDS, MAX_LONG_SHARE = 13.0, 0.02
ENGINEER_MEAN_WORDS, ENGINEER_LONG_SHARE = 15.0, 0.05

_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(
    r"(?:gateway|worker|shared|bench|tests|examples|deploy|loraplex)(?:/[\w.*-]+)+/?"
)
_SERIES = re.compile(r"\b(?:loraplex|gen_ai)_[a-z_]+\b")
_VERB = re.compile(r"(?<!from )\bloraplex ((?:adapters|aliases)(?: [a-z]+)?|[a-z]+)\b")
_PYTHON_M = re.compile(r"python3? -m ((?:gateway|worker|bench|loraplex)[\w.]*)")
_MAKE = re.compile(r"\bmake ([a-z][a-z-]+)\b")
PRIVATE_WORDS = re.compile(
    r"\b(?:flights?|tend|tending|shelf|shelves|fellows?|patience|heirs?|keeper)\b", re.I
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


every_page = pytest.mark.parametrize("page", EVERY_PAGE)
every_page_of_today = pytest.mark.parametrize("page", TODAY)


@every_page
def test_a_link_leads_to_a_file_and_to_a_heading_that_exist(page: str) -> None:
    broken = []
    for target in links(read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        headings = (
            anchors(file.read_text("utf-8")) if file.suffix == ".md" and file.is_file() else ()
        )
        if not file.is_file() or (anchor and anchor not in headings):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", MAX_LINES)
def test_a_page_with_a_bound_stays_within_it(page: str) -> None:
    assert len(read(page).splitlines()) <= MAX_LINES[page]


@pytest.mark.parametrize("page", OPERATOR_PAGES)
def test_an_operators_page_has_short_sentences(page: str) -> None:
    found = prose(read(page))
    long = [sentence for words, sentence in found.sentences + found.cells if words > LONG_WORDS]
    assert found.words_per_sentence <= MAX_MEAN_WORDS, found.words_per_sentence
    assert found.share_over(LONG_WORDS) <= MAX_LONG_SHARE, long
    assert not [s for words, s in found.cells if words > LONG_WORDS]


@pytest.mark.parametrize("page", ENGINEER_PAGES)
def test_an_engineers_page_has_few_long_sentences(page: str) -> None:
    found = prose(read(page))
    long = [sentence for words, sentence in found.sentences if words > LONG_WORDS]
    assert found.words_per_sentence <= ENGINEER_MEAN_WORDS, found.words_per_sentence
    assert found.share_over(LONG_WORDS) <= ENGINEER_LONG_SHARE, long


@every_page_of_today
def test_a_page_has_no_private_words(page: str) -> None:
    text = re.sub(r"in flight", "", _CODE.sub("", read(page)))
    assert sorted(set(PRIVATE_WORDS.findall(text))) == []


# ---- names in the pages exist --------------------------------------------------------------------


@every_page_of_today
def test_a_path_that_a_page_names_exists(page: str) -> None:
    named = {m for code in _CODE.findall(read(page)) for m in _PATH.findall(code)}
    assert sorted(p for p in named if not list(ROOT.glob(p.rstrip("/")))) == []


@pytest.mark.parametrize("page", ENGINEER_PAGES)
def test_a_class_that_an_engineers_page_names_exists(page: str) -> None:
    sources = [
        file.read_text("utf-8")
        for package in ("gateway", "worker", "shared")
        for file in (ROOT / package).rglob("*.py")
    ]
    known = {n for text in sources for n in re.findall(r"^(?:class )?([A-Z]\w+)\b", text, re.M)}
    known |= {n for text in sources for n in re.findall(r"^class ([A-Z]\w+)", text, re.M)}
    named = {code for code in _CODE.findall(read(page)) if re.fullmatch(r"[A-Z][a-z]\w+", code)}
    assert sorted(named - known) == []


@every_page_of_today
def test_a_module_that_a_page_runs_exists(page: str) -> None:
    named = {m.rstrip(".") for m in _PYTHON_M.findall(read(page))}
    assert sorted(m for m in named if importlib.util.find_spec(m) is None) == []


@every_page_of_today
def test_a_metric_that_a_page_names_is_exported(page: str) -> None:
    assert sorted(set(_SERIES.findall(read(page))) - exported_series()) == []


@every_page_of_today
def test_a_command_that_a_page_names_is_one_of_the_clis(page: str) -> None:
    named = {" ".join(m.split()) for code in code_of(read(page)) for m in _VERB.findall(code)}
    assert sorted(named - verbs()) == []


@every_page_of_today
def test_an_option_that_a_page_names_is_one_of_its_commands(page: str) -> None:
    known = options()
    wrong = []
    for code in code_of(read(page).replace("\\\n", " ")):
        for verb, rest in re.findall(r"(?<!from )\bloraplex ([a-z]+(?: [a-z]+)?)([^\n|;`]*)", code):
            command = verb if verb in known else verb.partition(" ")[0]
            given = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest)
            wrong += [f"{command} {o}" for o in given if o not in known.get(command, {o})]
    assert wrong == []


@every_page_of_today
def test_a_make_target_that_a_page_names_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    named = {m for code in code_of(read(page)) for m in _MAKE.findall(code)}
    assert sorted(named - targets) == []


def test_the_map_of_rooms_names_every_room() -> None:
    text = read("docs/ARCHITECTURE.md")
    rooms = {
        f"{package}/{room}/" if (ROOT / package / room).is_dir() else f"{package}/{room}.py"
        for package in ("gateway", "worker", "shared")
        for floor in FLOORS[package]
        for room in floor
    }
    assert sorted(room for room in rooms if f"`{room}`" not in text) == []


@pytest.mark.parametrize("package", FLOORS)
def test_the_table_of_floors_is_the_one_that_is_enforced(package: str) -> None:
    rows = [line.split("|") for line in read("docs/ARCHITECTURE.md").splitlines()]
    start = next(n for n, row in enumerate(rows) if row[1:2] == [" floor "])
    column = rows[start].index(f" {package} ")
    table = itertools.takewhile(lambda row: len(row) > column, rows[start + 2 :])
    floors = [rooms for row in table if (rooms := set(_CODE.findall(row[column])))]
    assert floors == FLOORS[package]


# ---- what the code knows, the pages say ----------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "prefix"),
    [
        (GatewayConfig, ""),
        (LinkConfig, "link."),
        (HTTPConfig, "http."),
        (RequestBoundsConfig, "bounds."),
        (TLSConfig, "tls."),
        (TracesConfig, "traces."),
        (LoraConfig, ""),
        (StoreConfig, "store."),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_config_page_has_every_key(section: Any, prefix: str) -> None:
    codes = set(_CODE.findall(read("docs/CONFIG.md")))
    sections = ("link", "store", "aliases", "http", "bounds", "tls", "traces")
    keys = set(section.__struct_fields__) - set(sections)
    assert sorted(key for key in keys if f"{prefix}{key}" not in codes) == []


def test_the_defaults_on_the_config_page_are_those_of_the_code() -> None:
    section = read("docs/CONFIG.md").partition("\n## `gateway`\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]*?) \|", section, re.M))
    given = GatewayConfig()
    wrong = {
        key: (rows[key], shown)
        for key in GatewayConfig.__struct_fields__
        if key in rows and rows[key] != (shown := _shown(getattr(given, key)))
    }
    assert wrong == {}


def test_the_config_page_names_the_keys_that_take_effect_without_a_restart() -> None:
    section = (
        read("docs/CONFIG.md").partition("\n## Changes while it runs\n")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", section, re.M)
    assert {of: tuple(_CODE.findall(keys)) for of, keys in rows} == {
        "gateway": reload.GATEWAY_KEYS,
        "lora_config": reload.LORA_KEYS,
        "deployment_config": reload.DEPLOYMENT_KEYS,
    }


@pytest.mark.parametrize("section", [AutoscalingConfig, BottleneckConfig, AutoscalingPolicy])
def test_the_scaling_page_has_every_key(section: Any) -> None:
    text = read("docs/SCALING.md")
    assert sorted(key for key in section.__struct_fields__ if key not in text) == []


def test_the_routing_page_has_every_policy() -> None:
    codes = set(_CODE.findall(read("docs/ROUTING.md")))
    assert sorted(set(get_args(RoutingPolicy)) - codes) == []


def test_the_operations_page_has_every_metric() -> None:
    named = set(_SERIES.findall(read("docs/OPERATIONS.md")))
    assert sorted(exported_series() - named) == []


@pytest.mark.parametrize(
    ("what", "bound"),
    [
        ("objects of any names", f"{bounds.MAX_FREE_BYTES >> 10} KiB each"),
        ("beams", f"{bounds.MAX_BEAMS}"),
        ("a head", f"{aiohttp_connection.MAX_HEADERS_BYTES >> 10} KiB"),
        ("a request for token ids", f"{MOST_COUNTED_BYTES >> 10} KiB; "),
        ("values of a body", f"{scan.MAX_VALUES:,}; {scan.MAX_TEXTS:,} texts"),
        ("messages", f"{bounds.DEFAULT_BOUNDS.max_messages}, with {bounds.MAX_PARTS} "),
        ("text of a request", f"{bounds.DEFAULT_BOUNDS.max_prompt_bytes >> 20} MiB"),
        ("prompts times", f"{bounds.DEFAULT_BOUNDS.max_sequences}"),
        ("structured output", f"{bounds.MAX_REPETITIONS:,} repetitions"),
    ],
)
def test_the_security_page_has_the_bounds_of_the_code(what: str, bound: str) -> None:
    rows = [line.split("|") for line in read("docs/SECURITY.md").splitlines()]
    shown = [row[2].strip() for row in rows if len(row) > 3 and row[1].strip().startswith(what)]
    assert len(shown) == 1 and bound in shown[0]


def test_the_adapters_page_has_every_option_of_an_alias() -> None:
    assert {"shares", "rollback"} <= set(AliasConfig.__struct_fields__)
    assert all(word in read("docs/ADAPTERS.md") for word in AliasConfig.__struct_fields__)


def test_the_operations_page_has_the_code_of_every_error_that_a_client_may_get() -> None:
    text = read("docs/OPERATIONS.md")
    codes = {cls.code for cls in _descendants(LoraplexError)}
    codes -= {"invalid_config", "link_error", "on_trial"}
    assert sorted(code for code in codes if code not in text) == []


# ---- the site ------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = [
        found
        for page in tmp_path.rglob("*.html")
        for found in re.findall(
            r'<(?:script|img|iframe)[^>]+src="https?:[^"]+|<link[^>]+rel="(?:stylesheet|preconnect)'
            r'"[^>]+href="https?:[^"]+',
            page.read_text("utf-8"),
        )
    ]
    assert loaded == []
    assert "Loraplex" in (tmp_path / "index.html").read_text("utf-8")


# ---- helpers -------------------------------------------------------------------------------------


def code_of(text: str) -> list[str]:
    return _CODE.findall(text) + re.findall(r"^```.*?^```", text, re.M | re.S)


def exported_series() -> set[str]:
    metrics = prometheus.Metrics()
    families = metrics.render([metrics.snapshot()], {}).decode()
    named = {f"loraplex_{name}_total" for name in metric_definitions.COUNTERS}
    named |= {collectors.series_name(name) for name in metric_definitions.DISTRIBUTIONS}
    named |= {f"loraplex_{name}" for name in metric_definitions.GAUGES}
    source = Path(collectors.__file__).read_text("utf-8")
    named |= set(re.findall(r'"(loraplex_[a-z_]+)"', source))
    return named | set(re.findall(r"^# TYPE (loraplex_\w+) ", families, re.M))


def verbs() -> set[str]:
    found = set()
    for verb, parser in _subparsers(_parser()).items():
        found |= {verb, *(f"{verb} {action}" for action in _subparsers(parser))}
    return found


def options() -> dict[str, set[str]]:
    """The options of each verb and of each of its actions. `bench load` reads its own."""
    found = {}
    for verb, parser in _subparsers(_parser()).items():
        for name, one in {"": parser, **_subparsers(parser)}.items():
            strings = {text for action in one._actions for text in action.option_strings}
            found[f"{verb} {name}".strip()] = strings
    return {verb: of for verb, of in found.items() if verb != "bench"}


def _subparsers(parser: Any) -> dict[str, Any]:
    return next(
        (dict(action.choices) for action in parser._actions if isinstance(action.choices, dict)), {}
    )


def _descendants(cls: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [c for child in cls.__subclasses__() for c in (child, *_descendants(child))]


def _shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1 << 30:
        return f"{value >> 30} GiB"
    if isinstance(value, int) and value >= 1 << 20:
        return f"{value >> 20} MiB"
    return f"{value:g}" if isinstance(value, float) else str(value)
