"""What `loraplex check` says of files and variables that are not here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.cli import check
from gateway.cli.check import missing_gateway_files, missing_model_folders
from shared.config.gateway import GatewayConfig, LinkConfig, TLSConfig
from shared.config.llm import LLMConfig, Settings
from shared.stores.object_store import StoreProblem


def test_every_file_and_variable_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "keys").write_text("x")
    monkeypatch.setenv("SET_KEYS", "x")
    monkeypatch.delenv("UNSET_KEYS", raising=False)
    present = GatewayConfig(api_keys_file=str(here), api_keys_env="SET_KEYS")
    assert [*missing_gateway_files(present)] == []
    gone = str(tmp_path / "gone")
    absent = GatewayConfig(
        keys_file=gone,
        admin_keys_env="UNSET_KEYS",
        tls=TLSConfig(certificate=gone, key=str(here)),
        link=LinkConfig(secret_env="UNSET_KEYS"),
    )
    assert [line.partition(":")[0] for line in missing_gateway_files(absent)] == [
        "gateway.keys_file",
        "gateway.tls.certificate",
        "gateway.admin_keys_env",
        "gateway.link.secret_env",
    ]


def test_a_folder_of_a_model_that_is_not_here_is_named(tmp_path: Path) -> None:
    def missing(**loading: str) -> list[str]:
        model = LLMConfig(model_loading_config={"model_id": "m"} | loading)
        return [line.split(": ")[1] for line in missing_model_folders(model)]

    here, gone = str(tmp_path), str(tmp_path / "gone")
    assert missing(model_source=here) == missing(model_source="org/m") == missing() == []
    assert missing(model_source=gone) == ["model_source"]
    assert missing(model_source="s3://b/m", tokenizer_source=gone) == ["tokenizer_source"]


def test_all_stores_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a", "b", "c")
    meeting = asyncio.Barrier(len(names))

    async def look(model: LLMConfig) -> list[tuple[StoreProblem | None, str]]:
        async with asyncio.timeout(10):
            await meeting.wait()
        return [(None, "looked at")]

    monkeypatch.setattr(check, "_look_at", look)
    models = tuple(LLMConfig(model_loading_config={"model_id": name}) for name in names)
    assert check.look_at_stores(Settings(models=models)) == (
        [],
        [f"{name}: looked at" for name in names],
    )
