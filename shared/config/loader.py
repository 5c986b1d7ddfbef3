"""Pure. Turns a whole configuration file into Settings. It knows Ray Serve's file forms, included
files, and the rules between models.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from shared.config.document.kuberay_manifest import out_of_manifest
from shared.config.document.placeholders import filled_in
from shared.config.document.yaml_document import Document, read_document
from shared.config.gateway import GatewayConfig
from shared.config.llm import LLMConfig, Settings
from shared.config.local_paths import rooted, rooted_gateway
from shared.config.ray_serve import Application, ConfigFile, LLMServingArgs
from shared.config.section import (
    Finding,
    Path,
    Section,
    dotted,
    error_lines,
    read_fields,
    read_section,
    shown,
    warning_lines,
)
from shared.config.vllm_server_arguments import variable_warnings
from shared.errors import ConfigError

ReadFile = Callable[[str], str]
"""path -> text. Raises OSError, UnicodeDecodeError or ConfigError."""

_PLACE = re.compile(r"(?P<file>.*?):(?P<line>[0-9]+): ")
HOLDER = "x-"
"""Keys at the top that begin so hold what other keys refer to (`&name`, `*name`)."""
MAX_PROBLEMS = 50  # most lines in one ConfigError
_T = TypeVar("_T", bound=Section)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a configuration came from. `source` names it in messages, relative paths start at
    `base_dir`, and ~ is `home`.
    """

    source: str
    base_dir: str
    home: str | None
    read_file: ReadFile
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class ConfigReport:
    """Everything that was found so far, and the line of each key."""

    source: str
    places: dict[Path, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def locate(self, document: Document, path: Path) -> None:
        """Notes the lines of a document whose root stands at `path`."""
        self.places.update(
            {(*path, *key): f"{document.source}:{line}" for key, line in document.lines.items()}
        )
        self.errors += document.problems

    def where(self, path: Path) -> str:
        """`file:line` of the key, or of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.source

    def add(self, findings: Sequence[Finding]) -> None:
        self.errors += error_lines(findings, self.where)
        self.warnings += warning_lines(findings, self.where)

    def error(self, path: Path, text: str, other: Path | None = None) -> None:
        self.add([Finding(path, text, other=other)])

    def fields(self, cls: type[Section], raw: object, path: Path) -> dict[str, Any]:
        """The good fields of a section that only encloses others."""
        if not isinstance(raw, Mapping):
            self.error(path, f"expected a mapping of keys, got {shown(raw)}")
            return {}
        values, findings = read_fields(cls, raw, path)
        self.add(findings)
        return values

    def section(self, cls: type[_T], raw: object, path: Path) -> _T | None:
        section, findings = read_section(cls, raw, path)
        self.add(findings)
        return section

    def _order(self, line: str) -> tuple[bool, str, int]:
        """Sorts by place: this file before the included ones."""
        place = _PLACE.match(line)
        file, number = (place["file"], int(place["line"])) if place else (self.source, 0)
        return file != self.source, file, number

    def raise_if_errors(self) -> None:
        if self.errors:
            lines = sorted(dict.fromkeys(self.errors), key=self._order)
            more = (
                [f"... and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
            )
            raise ConfigError("\n".join(lines[:MAX_PROBLEMS] + more))


def parse_settings(
    text: str,
    source: str,
    read_file: ReadFile,
    *,
    base_dir: str | None = None,
    home: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Settings:
    """The settings in a configuration file's text. Relative paths in it start at `base_dir`, by
    default the folder of `source`. `env` fills in `${NAME}`.

    Raises ConfigError with one line per problem: `file:line: key: what is wrong; what to do`.
    """
    report = ConfigReport(source)
    document = out_of_manifest(read_document(text, source))
    report.locate(document, ())
    if isinstance(document.value, dict):
        document.value = {k: v for k, v in document.value.items() if not k.startswith(HOLDER)}
    elif document.value is not None and not document.problems:
        report.error((), f"expected keys such as llm_configs:, got {shown(document.value)}")
    document.value, missing = filled_in(document, env or {})
    report.add(missing)
    if document.value is None and not report.errors:
        report.errors.append(f"{source}: is empty; expected llm_configs: with at least one model")
    report.raise_if_errors()  # if the file is not valid YAML, its keys say nothing
    origin = Origin(
        source,
        os.path.dirname(source) if base_dir is None else base_dir,
        home,
        read_file,
        env or {},
    )
    top = report.fields(ConfigFile, document.value, ())
    http = top.get("http_options")
    listen = {
        key: value for key in ("host", "port") if (value := getattr(http, key, None)) is not None
    }
    if top.get("applications") is None:
        return _settings(report, origin, top, (), listen)
    args, path = _application(report, top)
    if top.get("gateway") is not None:
        args = {**args, "gateway": top["gateway"]} if args.get("gateway") is None else args
        return _settings(report, origin, args, path, listen, gateway_path=("gateway",))
    return _settings(report, origin, args, path, listen)


def settings_from_args(args: object, origin: Origin) -> Settings:
    """The settings from the argument of `build_openai_app`.

    Raises ConfigError with one line per problem.
    """
    report = ConfigReport(origin.source)
    if isinstance(args, LLMServingArgs):
        args = msgspec.structs.asdict(args)
    return _settings(report, origin, report.fields(LLMServingArgs, args, ()), (), {})


def _application(report: ConfigReport, top: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The arguments of the one application, and where they stand in the file."""
    path: Path = ("applications",)
    applications = top["applications"]
    if top.get("llm_configs") is not None:
        report.error(
            path,
            "llm_configs stands both here and at the top level; keep one of the two",
            other=("llm_configs",),
        )
    if not isinstance(applications, list) or not applications:
        report.error(
            path,
            "expected a list with one application, got "
            f"{shown(applications) if applications else 'an empty one'}",
        )
        report.raise_if_errors()
    if len(applications) > 1:
        report.error(
            (*path, 1),
            f"{len(applications)} applications, but one gateway serves all models; "
            "merge their llm_configs into the first",
        )
    app = report.fields(Application, applications[0], (*path, 0))
    args_path = (*path, 0, "args")
    if app.get("args") is None:
        report.error(args_path, "is missing; expected args: llm_configs: with at least one model")
        report.raise_if_errors()
    return report.fields(LLMServingArgs, app["args"], args_path), args_path


def _settings(
    report: ConfigReport,
    origin: Origin,
    args: Mapping[str, Any],
    path: Path,
    listen: Mapping[str, Any],
    gateway_path: Path | None = None,
) -> Settings:
    gateway = _gateway(report, args.get("gateway"), gateway_path or (*path, "gateway"), listen)
    entries, here = args.get("llm_configs"), (*path, "llm_configs")
    if entries is None or entries == [] or entries == ():
        report.error(here, "has no model; list at least one")
        entries = []
    elif not isinstance(entries, list | tuple):
        report.error(here, f"expected a list of models, got {shown(entries)}")
        entries = []
    models = [
        (model, (*here, n))
        for n, entry in enumerate(entries)
        if (model := _model(report, origin, entry, (*here, n))) is not None
    ]
    _refuse_twins(report, models)
    report.raise_if_errors()
    assert gateway is not None
    if any(model.llm_engine == "vLLM" for model, _ in models):
        report.warnings += variable_warnings(origin.env, gateway.asks_for_keys)
    return Settings(
        models=tuple(model for model, _ in models),
        gateway=rooted_gateway(gateway, origin.base_dir, origin.home),
        source=origin.source,
        warnings=tuple(dict.fromkeys(report.warnings)),
        places={dotted(key): place for key, place in report.places.items() if key},
        model_paths=tuple(dotted(model_path) for _, model_path in models),
    )


def _gateway(
    report: ConfigReport, raw: object, path: Path, listen: Mapping[str, Any]
) -> GatewayConfig | None:
    taken: Mapping[str, Any] = {}
    if raw is None:
        raw = {}
    if isinstance(raw, Mapping):
        for key in listen:
            if raw.get(key) not in (None, listen[key]):
                found = Finding(
                    ("http_options", key),
                    f"has no effect here: gateway.{key} is set",
                    "warning",
                    other=(*path, key),
                )
                report.add([found])
        taken = {key: value for key, value in listen.items() if raw.get(key) is None}
        report.places.update({(*path, key): report.where(("http_options", key)) for key in taken})
        raw = {**raw, **taken}
    gateway, findings = read_section(GatewayConfig, raw, path)
    of_ray: dict[Path, Path] = {(*path, key): ("http_options", key) for key in taken}
    report.add([replace(found, path=of_ray.get(found.path, found.path)) for found in findings])
    return gateway


def _model(report: ConfigReport, origin: Origin, entry: object, path: Path) -> LLMConfig | None:
    base_dir = origin.base_dir
    if isinstance(entry, str):
        if not entry.strip() or "\0" in entry:
            report.error(path, "expected a model or the path of a file with one, got an empty text")
            return None
        file = os.path.normpath(os.path.join(base_dir, entry))
        base_dir = os.path.dirname(file)
        document = _included(report, origin, entry, file, path)
        if document is None:
            return None
        entry = document.value
    model = report.section(LLMConfig, entry, path)
    return None if model is None else rooted(model, base_dir, origin.home)


def _included(
    report: ConfigReport, origin: Origin, name: str, file: str, path: Path
) -> Document | None:
    """The document of a model that has a file of its own. None if that cannot be read."""
    try:
        text = origin.read_file(file)
    except OSError as exc:
        report.error(
            path,
            f"cannot read {shown(name)}: {exc.strerror or 'not readable'}; paths are "
            "relative to this file",
        )
        return None
    except UnicodeDecodeError:
        report.error(path, f"cannot read {shown(name)}: it is not UTF-8 text")
        return None
    except ConfigError as exc:
        report.error(path, exc.message)
        return None
    source = os.path.normpath(os.path.join(os.path.dirname(origin.source), name))
    document = read_document(text, source)
    report.locate(document, path)
    if document.problems:
        return None
    if document.value is None:
        report.error(path, f"{shown(name)} is empty; expected one model")
        return None
    document.value, missing = filled_in(document, origin.env, path)
    report.add(missing)
    return document


def _refuse_twins(report: ConfigReport, models: Sequence[tuple[LLMConfig, Path]]) -> None:
    seen: dict[str, Path] = {}
    for model, path in models:
        here = (*path, "model_loading_config", "model_id")
        if model.model_id in seen:
            report.error(
                here,
                f"{shown(model.model_id)} is the id of two models; ids must be unique",
                other=seen[model.model_id],
            )
        seen.setdefault(model.model_id, here)
