"""What `loraplex check` says of files and variables that are not here, and whether it asks vLLM."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.cli import check
from gateway.cli.check import missing_gateway_files, missing_model_folders
from gateway.cli.main import main
from shared.config.gateway import GatewayConfig, LinkConfig, TLSConfig
from shared.config.llm import LLMConfig, Settings
from shared.config.vllm_engine_arguments import read_known_arguments
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


VLLM = "llm_configs: [{model_loading_config: {model_id: m}, engine_kwargs: {%s}}]\n"


def checked(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> int:
    """The exit status, with a vLLM that must not be asked."""
    monkeypatch.setattr(check, "installed_version", lambda: version)
    monkeypatch.setattr(check, "command", lambda module: ["/nonexistent/python", module])
    (tmp_path / "c.yaml").write_text(text)
    return main(["check", str(tmp_path / "c.yaml")])


KEPT_VERSION = read_known_arguments(check.KEPT.read_bytes()).version


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("llm_configs: [{model_loading_config: {model_id: m}, llm_engine: sim}]\n", 0),
        (VLLM % "", 0),
        (VLLM % "max_modl_len: 5", 2),
    ],
    ids=["simulated", "nothing to judge", "a mistake that is plain"],
)
def test_vllm_is_not_asked_where_it_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int
) -> None:
    assert checked(text, tmp_path, monkeypatch, KEPT_VERSION) == status
    with pytest.raises(FileNotFoundError):
        checked(VLLM % "max_num_seqs: 5", tmp_path, monkeypatch, KEPT_VERSION)


def test_without_vllm_it_says_what_was_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(VLLM % "max_num_seqs: 5", tmp_path, monkeypatch, None) == 0
    assert "vLLM is not installed here" in capsys.readouterr().err


def test_a_vllm_that_cannot_be_asked_is_a_warning_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "installed_version", lambda: KEPT_VERSION)
    monkeypatch.setattr(
        check, "command", lambda module: ["sh", "-c", "echo no module vllm >&2; exit 1"]
    )
    (tmp_path / "c.yaml").write_text(VLLM % "max_num_seqs: 5")
    assert main(["check", str(tmp_path / "c.yaml")]) == 0
    assert "could not be asked" in (said := capsys.readouterr().err) and "no module vllm" in said
