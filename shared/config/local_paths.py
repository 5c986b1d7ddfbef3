"""Pure. The local paths of a configuration, made absolute: they count from its folder."""

from __future__ import annotations

import os.path
from typing import Any

import msgspec

from shared.config.gateway import GatewayConfig, TLSConfig
from shared.config.llm import LLMConfig
from shared.config.vllm_engine_arguments import FILES, names_file


def rooted(config: LLMConfig, base_dir: str, home: str | None = None) -> LLMConfig:
    """The config with absolute local paths. Adapters, ./model folders and files of engine_kwargs
    are relative to `base_dir`, and ~ stands for `home`.
    """
    loading, lora = config.model_loading_config, config.lora_config
    source, tokenizer = (
        _explicit(path, base_dir, home)
        for path in (config.model_loading_config.model_source, loading.tokenizer_source)
    )
    loading = msgspec.structs.replace(loading, model_source=source, tokenizer_source=tokenizer)
    if lora is not None and lora.dynamic_lora_loading_path is not None:
        path = lora.dynamic_lora_loading_path
        lora = msgspec.structs.replace(
            lora,
            dynamic_lora_loading_path=path if "://" in path else local_path(path, base_dir, home),
        )
    files = {
        key: local_path(name, base_dir, home)
        for key in FILES
        if names_file(name := config.engine_kwargs.get(key))
    }
    return msgspec.structs.replace(
        config,
        model_loading_config=loading,
        lora_config=lora,
        engine_kwargs={**config.engine_kwargs, **files},
    )


def rooted_gateway(config: GatewayConfig, base_dir: str, home: str | None = None) -> GatewayConfig:
    """The gateway section with absolute local paths."""
    keys, api, admin, certificate, tls_key = (
        None if path is None else local_path(path, base_dir, home)
        for path in (
            config.keys_file,
            config.api_keys_file,
            config.admin_keys_file,
            config.tls.certificate,
            config.tls.key,
        )
    )
    return msgspec.structs.replace(
        config,
        state_dir=local_path(config.state_dir, base_dir, home),
        keys_file=keys,
        api_keys_file=api,
        admin_keys_file=admin,
        tls=TLSConfig(certificate=certificate, key=tls_key),
    )


def local_path(path: str, base_dir: str, home: str | None) -> str:
    """`path` as seen from `base_dir`. Without `home`, ~ stays as it is."""
    if path == "~" or path.startswith("~/"):
        return path if home is None else os.path.normpath(home + path[1:])
    return os.path.normpath(os.path.join(base_dir, path))


def _explicit(source: Any, base_dir: str, home: str | None) -> Any:
    """A model source is a path only if it looks like one: org/name is a Hugging Face id."""
    if isinstance(source, str) and source.startswith(("./", "../", "~/", "/")):
        return local_path(source, base_dir, home)
    return source
