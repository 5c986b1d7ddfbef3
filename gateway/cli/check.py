"""Shell. `loraplex check`: checks a configuration against vLLM's own arguments and against its
adapter stores. vLLM is asked, in a process of its own, for what only it knows.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import operator
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.supervisor.autoscaling.custom_policy import load_policy
from loraplex.start import command
from shared.config.gateway import GatewayConfig
from shared.config.llm import TARGET_SHARE, LLMConfig, Settings, engine_kwargs_problems
from shared.config.settings_file import read_settings
from shared.config.vllm.refusals import VllmVerdict, read_verdicts, refusal_lines
from shared.config.vllm_engine_arguments import (
    FILES,
    Argument,
    KnownArguments,
    names_file,
    read_known_arguments,
)
from shared.errors import ConfigError, LoraplexError
from shared.runtime.process import PARENT_ENV
from shared.stores import open_store
from shared.stores.listing import SkippedFolder
from shared.stores.object_store import StoreFailure, StoreProblem
from shared.vllm_versions import cannot_import, is_tried, warning

KEPT = Path(__file__).parents[2] / "shared" / "config" / "vllm_arguments.json"
_VERSION = re.compile(r"""^__version__ = .*?['"]([^'"+]+)""", re.MULTILINE)
LOOK_S = 10.0
UNASKED = (
    "vLLM is not installed here, so engine_kwargs were compared with a list of its arguments. Not "
    "checked were values that do not go together, chat templates, and what the model allows; run "
    "`loraplex check` where vLLM is"
)
ABSENT = (
    StoreProblem.NO_BUCKET,
    StoreProblem.NO_FOLDER,
    StoreProblem.NO_PREFIX,
    StoreProblem.NO_REPOSITORY,
)


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "check",
        help="check a config",
        description="Check a config, including engine_kwargs against vLLM's own arguments.",
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.set_defaults(run=run)


def load(path: str) -> Settings:
    """Reads a configuration and prints its warnings. Raises ConfigError."""
    settings = read_settings(path)
    for text in settings.warnings:
        _warn(text)
    return settings


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    settings = load(args.config)
    remarks: list[str] = []
    if any(m.llm_engine == "vLLM" for m in settings.models):
        for text in warnings():
            _warn(text)
    if any(m.llm_engine == "vLLM" and m.engine_kwargs for m in settings.models):
        found = problems(settings)
        if found:
            raise ConfigError("\n".join(found))
        refused, doubts, remarks = refusal_lines(settings, _verdicts(settings.models))
        for text in doubts:
            _warn(text)
        if refused:
            raise ConfigError("\n".join(refused))
    errors, notes = look_at_stores(settings)
    if errors:
        raise ConfigError("\n".join(errors))
    for model in settings.models:
        _describe(model)
    g = settings.gateway
    for missing in missing_gateway_files(g):
        _warn(missing)
    for note in (*remarks, *notes):
        print(note)
    scheme = "https" if g.tls.certificate else "http"
    print(f"gateway: {scheme}://{g.host}:{g.port}, {g.processes} process(es)\nok")
    return 0


def _describe(model: LLMConfig) -> None:
    """Prints what the config starts for the model."""
    gpus = f", {model.gpus_per_worker} GPU each" if model.gpus_per_worker else ""
    path, slots = model.adapters_path, _slots(model)
    adapters = f"adapters from {path}, {slots} a worker" if path else "no adapters"
    engine, workers = model.llm_engine, model.workers
    print(f"{model.model_id}: {engine}, {workers} worker(s){gpus}, {adapters}")
    if (line := _scaling_line(model)) is not None:
        print(f"  {line}")
    if (missing := missing_policy(model)) is not None:
        _warn(f"{model.model_id}: {missing}")
    if model.llm_engine == "vLLM":
        for text in missing_model_folders(model):
            _warn(text)


def _slots(model: LLMConfig) -> str:
    if model.given_max_loras is None and model.gpus_per_worker:
        return "as many slots as the GPU has room for"
    return f"{model.max_loras} slots"


def _scaling_line(model: LLMConfig) -> str | None:
    """Between which bounds the model scales, and at which load."""
    scaling = model.deployment_config.autoscaling_config
    if scaling is None or not scaling.scales:
        return None
    how = (
        "as given"
        if scaling.target_ongoing_requests is not None
        else f"{TARGET_SHARE:.0%} of the {model.runs_at_once} that a worker runs at once; its own "
        "number holds once it serves"
    )
    return (
        f"scales from {scaling.min_replicas or 'zero'} to {scaling.max_replicas}: "
        "one worker for each "
        f"{model.target_ongoing_requests:g} requests ({how})"
    )


def warnings() -> list[str]:
    """What is to be said of the installed vLLM."""
    version = installed_version()
    return [warning(version)] if version and not is_tried(version) else []


def problems(settings: Settings) -> list[str]:
    """One line for each value that vLLM would refuse, with its place in the file."""
    known = known_arguments()
    return [
        *engine_kwargs_problems(settings, known),
        *(
            f"{settings.places.get(place, settings.source)}: {place}: {text}"
            for model, path in zip(settings.models, settings.model_paths, strict=True)
            for key, text in missing_files(model.engine_kwargs)
            for place in (f"{path}.engine_kwargs.{key}",)
        ),
    ]


def missing_policy(model: LLMConfig) -> str | None:
    """Why the scaling policy of the model cannot be loaded here. None: it can, or there is none."""
    scaling = model.deployment_config.autoscaling_config
    try:
        load_policy(scaling.policy if scaling is not None else None)
    except ConfigError as exc:
        return exc.message
    return None


def missing_files(kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, problem) for each file that is named and does not exist."""
    for key in FILES:
        value = kwargs.get(key)
        if names_file(value) and not Path(value).expanduser().is_file():
            yield key, f"there is no file '{value[:200]}'"


def missing_gateway_files(gateway: GatewayConfig) -> Iterator[str]:
    """A line for each file of keys or certificates, and each variable, that is not on this host. It
    may be on the host of the gateway.
    """
    for key in ("keys_file", "api_keys_file", "admin_keys_file", "tls.certificate", "tls.key"):
        path = operator.attrgetter(key)(gateway)
        if path is not None and not Path(path).expanduser().exists():
            yield f"gateway.{key}: there is no file '{path[:200]}' on this host"
    for key in ("api_keys_env", "admin_keys_env", "link.secret_env"):
        name = operator.attrgetter(key)(gateway)
        if name is not None and not os.environ.get(name):
            yield f"gateway.{key}: the variable {name} is not set here"


def missing_model_folders(model: LLMConfig) -> Iterator[str]:
    """A line for each local path of the model that is not on this host. It may be on the
    workers'.
    """
    tokenizer = model.model_loading_config.tokenizer_source or ""
    for key, path in (("model_source", model.model_source), ("tokenizer_source", tokenizer)):
        if path.startswith(("/", "~")) and not Path(path).expanduser().exists():
            yield f"{model.model_id}: {key}: there is no '{path[:200]}' on this host"


def known_arguments() -> Mapping[str, Argument]:
    """vLLM's arguments: the copy in the source tree if it is of the installed version, else vLLM's
    answer.
    """
    kept = read_known_arguments(KEPT.read_bytes())
    installed = installed_version()
    if installed is None or installed == kept.version:
        return kept.arguments
    return _ask_vllm().arguments


def installed_version() -> str | None:
    """The version of vLLM, read without importing it (an import takes 10 s). None: vLLM is not
    installed.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return None
    try:
        match = _VERSION.search(Path(found.origin).with_name("_version.py").read_text("utf-8"))
    except OSError:
        return ""
    return match[1] if match is not None else ""


def _ask_vllm() -> KnownArguments:
    print("asking vLLM for its arguments (about 10 s) ...", file=sys.stderr, flush=True)
    answer = subprocess.run(
        command("worker.engine.vllm.arguments"), capture_output=True, check=False
    )
    try:
        return read_known_arguments(answer.stdout.splitlines()[-1])
    except (IndexError, msgspec.MsgspecError) as exc:
        last = answer.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(cannot_import(installed_version(), last or "without a word")) from exc


def _verdicts(models: Sequence[LLMConfig]) -> list[VllmVerdict | None]:
    """What vLLM makes of the engine_kwargs of each model. None: it was not asked."""
    asked = [model for model in models if model.llm_engine == "vLLM" and model.engine_kwargs]
    if installed_version() is None:
        _warn(UNASKED)
        return [None] * len(models)
    print("asking vLLM for its verdict (about 10 s) ...", file=sys.stderr, flush=True)
    answer = subprocess.run(
        command("worker.engine.vllm.boot.refusals"),
        input=msgspec.json.encode(asked),
        env={**os.environ, PARENT_ENV: str(os.getpid())},
        capture_output=True,
        check=False,
    )
    try:
        found = iter(read_verdicts(answer.stdout.splitlines()[-1]))
    except (IndexError, msgspec.MsgspecError):
        last = answer.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        _warn(f"vLLM could not be asked whether it takes the engine_kwargs: {last}")
        return [None] * len(models)
    return [next(found) if model in asked else None for model in models]


def look_at_stores(settings: Settings) -> tuple[list[str], list[str]]:
    """(errors, notes). A store that cannot be reached from this host is only a note, because
    `check` often runs where there are no credentials.
    """
    errors: list[str] = []
    notes: list[str] = []
    seen = asyncio.run(_look_at_all(settings.models))
    for model, found in zip(settings.models, seen, strict=True):
        for problem, text in found:
            (errors if problem in ABSENT else notes).append(f"{model.model_id}: {text}")
    return errors, notes


async def _look_at_all(
    models: Sequence[LLMConfig],
) -> list[list[tuple[StoreProblem | None, str]]]:
    """At once: each store may take LOOK_S."""
    return await asyncio.gather(*(_look_at(model) for model in models))


async def _look_at(model: LLMConfig) -> list[tuple[StoreProblem | None, str]]:
    if model.adapters_path is None or model.lora_config is None:
        return []
    options = msgspec.structs.asdict(model.lora_config.store)
    try:
        async with asyncio.timeout(LOOK_S), open_store(model.adapters_path, options) as store:
            if not await store.exists():
                return [
                    (StoreProblem.NO_PREFIX, f"nothing lies below {store.url}; is the path right?")
                ]
            count = 0
            async for _ in store.list():
                count += 1
            return [(None, text) for text in _notes_of(store.url, count, store.skipped.shown)]
    except TimeoutError:
        return [(None, f"{model.adapters_path} was not looked through within {LOOK_S:g} s")]
    except LoraplexError as exc:
        problem = exc.trouble if isinstance(exc, StoreFailure) else None
        return [(problem, f"{model.adapters_path}: {exc.message}")]


def _notes_of(url: str, count: int, skipped: Sequence[SkippedFolder]) -> Iterator[str]:
    if not count:
        yield f"no adapters in {url} yet"
    for one in skipped:
        yield f"the folder {one.key} of the store is skipped: {one.why}"
