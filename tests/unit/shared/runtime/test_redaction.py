"""Shell. Secrets that must not leave the machine, and words that only look like them."""

from __future__ import annotations

import pytest

from shared.runtime.redaction import LEFT_OUT, without_credentials, without_secrets

S = "Abc123secretXYZ"
IN_A_CONFIG = (
    f"  api_key: {S}",
    f"  api_keys: [{S}, {S}]",
    f"  api_keys:\n    - {S}\n    - {S}\n",
    f"  api_keys:\n  - {S}\n  - {S}\n",
    f'  "hf_token": "{S}"',
    f"  - password: {S}",
    f"  store: {{access_key_id: x, secret_access_key: {S}}}",
    f"  url: s3://user:{S}@host/x",
    f"AWS_SECRET_ACCESS_KEY: {S}",
    f"  secret: |\n    {S}\n    {S}\n",
    f"  secret: >-\n\n    {S}\n",
    f"  link_secret: {S}  # rotate",
    f"  azure: {{account_key: '{S}', connection_string: \"AccountKey={S};x\"}}",
    f"  connection_string: DefaultEndpointsProtocol=https;AccountName=x;AccountKey={S}",
    f"  headers: {{Authorization: Bearer {S}}}",
    f"  env: {{HF_TOKEN: {S}}}",
    f"  runtime_env: {{env_vars: {{OPENAI_API_KEY: {S}}}}}",
    f"  # the key was sk-{S}",
    f"  path: https://x.blob.core.windows.net/c?sv=1&sig={S}",
)
IN_A_LOG = (
    f"Authorization: Bearer {S}",
    f'{{"headers": {{"authorization": "Bearer {S}"}}}}',
    f"GET https://bucket/x?X-Amz-Credential={S}&X-Amz-Signature={S}&y=1",
    f"cannot read s3://{S}:{S}@host/x",
    f"cannot read s3://user:a@{S}@host/x",
    f"token sk-{S}",
    f"AKIA{S.upper()}",
    f"eyJ{S}.{S}.{S}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n-----END RSA PRIVATE KEY-----",
)
HARMLESS = (
    "max_tokens: 64",
    "  max_num_batched_tokens: 8192",
    "  api_keys_env: LORAPLEX_KEYS",
    "  keys_file: keys.yaml",
    "  tokens_per_minute: 1000",
    "  prompt_tokens: 12",
    "  model_id: demo",
    "  tokenizer: demo/model",
    "  resume_max_tokens: 100",
    "# keys are in keys.yaml",
)


@pytest.mark.parametrize("line", IN_A_CONFIG)
def test_secrets_of_a_config_are_left_out_and_what_follows_stays(line: str) -> None:
    shown = without_secrets(f"a: 1\n{line}\nb: 2\n")
    assert S not in shown and LEFT_OUT in shown, shown
    assert shown.startswith("a: 1\n") and shown.endswith("b: 2\n"), shown


@pytest.mark.parametrize("line", IN_A_LOG)
def test_credentials_in_logs_are_left_out(line: str) -> None:
    shown = without_credentials(f"before\n{line}\nafter")
    assert S not in shown and S.upper() not in shown, shown
    assert shown.startswith("before\n") and shown.endswith("\nafter"), shown


@pytest.mark.parametrize("line", HARMLESS)
def test_what_is_no_secret_stays(line: str) -> None:
    assert without_secrets(line) == without_credentials(line) == line


def test_a_known_secret_goes_wherever_it_stands_and_a_short_one_is_not_searched_for() -> None:
    assert without_credentials("x hunter22 y", ["hunter22"]) == f"x {LEFT_OUT} y"
    assert without_credentials("a b c", ["a", ""]) == "a b c"
