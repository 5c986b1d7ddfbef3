"""Shell. Checks one adapter as a worker would, without engine and gateway, and prints the verdict.
It serves `loraplex adapters validate`.

    python -m worker.validation PATH_OR_URL --config CONFIG [--model BASE] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import msgspec

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import CONFIG_FILE
from shared.config.llm import LLMConfig, Settings
from shared.config.settings_file import read_settings
from shared.errors import AdapterNotFound, ConfigError, InvalidAdapter, LoraplexError
from shared.stores import open_store
from shared.stores.transfer import Transfer, TransferRetries
from worker.validation.factory import DEFAULT_MAX_RANK, open_validator

VALID, NOT_VALID, NOT_CHECKED = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.validation", description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    for name, level in (("VLLM_LOGGING_LEVEL", "ERROR"), ("TRANSFORMERS_VERBOSITY", "error")):
        # if vLLM has to be asked, only the verdict should be seen
        os.environ.setdefault(name, level)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        facts = asyncio.run(
            validate(args.path, choose_model(read_settings(args.config), args.model))
        )
    except (InvalidAdapter, AdapterNotFound) as exc:
        return _say(
            args.json,
            NOT_VALID,
            f"not valid: {exc.code}: {exc.message}",
            {"valid": False, "code": exc.code, "reason": exc.message},
        )
    except LoraplexError as exc:
        return _say(
            args.json,
            NOT_CHECKED,
            f"not checked: {exc.message}",
            {"valid": None, "code": exc.code, "reason": exc.message},
        )
    good = {
        "valid": True,
        "rank": facts.rank,
        "bytes": facts.size_bytes,
        "modules": list(facts.modules),
    }
    modules = f", changes {', '.join(facts.modules)}" if facts.modules else ""
    return _say(
        args.json,
        VALID,
        f"valid: rank {facts.rank}, {facts.size_bytes / 2**20:.1f} MiB{modules}",
        good,
    )


async def validate(path: str, model: LLMConfig) -> AdapterFacts:
    """Fetches the adapter from its folder or bucket, as a worker does, and checks it.

    Raises:
        InvalidAdapter, AdapterNotFound: no worker would serve it.
        ConfigError, StoreUnavailable: it could not be checked.
    """
    validator = open_validator(
        model, int(model.engine_kwargs.get("max_lora_rank") or DEFAULT_MAX_RANK)
    )
    root, name = _split(path)
    lora = model.lora_config
    same = (
        lora is not None
        and (model.adapters_path or "").partition("://")[0] == path.partition("://")[0]
        and "://" in path
    )
    options = msgspec.structs.asdict(lora.store) if lora is not None and same else {}
    async with open_store(root, options) as store:
        found = await store.find(name)
        if found is None:
            raise AdapterNotFound(
                f"There is no {CONFIG_FILE} in `{path}`, or the folder's name is none "
                "that an adapter may have."
            )
        pace = (
            TransferRetries(lora.download_timeout_s, lora.max_download_tries)
            if lora is not None
            else TransferRetries(30.0, 3)
        )
        with tempfile.TemporaryDirectory(prefix="loraplex-validate-") as folder:
            await store.fetch(found, Path(folder), Transfer(pace=pace))
            return await asyncio.to_thread(validator.check, Path(folder))


def choose_model(settings: Settings, model_id: str | None) -> LLMConfig:
    """The model to check against. Raises ConfigError if it is not clear which one."""
    ids = ", ".join(m.model_id for m in settings.models)
    if model_id is None and len(settings.models) > 1:
        raise ConfigError(f"{settings.source} has several models: choose one with --model ({ids})")
    model = settings.models[0] if model_id is None else settings.model(model_id)
    if model is None:
        raise ConfigError(f"{settings.source} has no model `{model_id}` (it has {ids})")
    return model


def _split(path: str) -> tuple[str, str]:
    """The store that holds the adapter, and the adapter's name in it."""
    if path.startswith("hf://"):
        org, _, name = path.removeprefix("hf://").rstrip("/").partition("/")
        if not name:
            raise ConfigError(f"{path} names no repository; write it as hf://org/repo")
        repo, at, _ = name.partition("@")
        return (path, repo) if at else (f"hf://{org}", name)
    if "://" in path and not path.startswith("file://"):
        root, _, name = path.rstrip("/").rpartition("/")
        if root.endswith((":/", "//")) or "//" not in root:
            raise ConfigError(f"{path} names no folder; write it as s3://bucket/folder")
        return root, name
    folder = os.path.realpath(os.path.expanduser(path.removeprefix("file://")))
    if not os.path.isdir(folder):
        raise ConfigError(f"{path} is no folder")
    return os.path.dirname(folder), os.path.basename(folder)


def _say(as_json: bool, status: int, text: str, facts: dict[str, object]) -> int:
    sys.stdout.write((json.dumps(facts) if as_json else text) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
