"""Shell. `loraplex bundle` against a running gateway: what is in the file, and what is not."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

from tests.forks import loraplex
from tests.harness import chat_body, cluster, sim_config

PROMPT, KEY = "the-prompt-of-somebody", "a.key.that.nobody.may.see"
LINK, ADMIN = "the.link.secret.of.this.place", "the.admin.key.of.this.place"
CONFIG = """
engine_kwargs: {{hf_token: {key}, max_num_batched_tokens: 8192}}
lora_config:
  store:
    secret_access_key: >-
      {key}
gateway:
  api_keys_env: NAME
  admin_keys_file: {admins}
  link: {{secret_env: TEST_LINK_SECRET}}
"""


async def bundle(*more: str) -> tuple[int, str, str]:
    return await loraplex("bundle", *more, env={**os.environ, "TEST_LINK_SECRET": LINK})


async def test_a_bundle_has_states_requests_logs_and_versions_and_no_prompt_and_no_secret(
    tmp_path: Path, adapters: Path
) -> None:
    config = tmp_path / "mine.yaml"
    admins = tmp_path / "admins"
    admins.write_text(f"{ADMIN}\n")
    config.write_text(CONFIG.format(key=KEY, admins=admins.name))  # of the config's folder
    target = tmp_path / "bundle.tar.gz"
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        headers = {"Authorization": f"Bearer {KEY}"}
        await c.post("/v1/chat/completions", chat_body("sim", PROMPT, max_tokens=2), headers)
        # secrets where nobody expects them: in the name of a model, and in the id of a request
        named = {"x-request-id": f"Bearer {KEY}"}
        await c.post("/v1/chat/completions", chat_body(f"sim:{LINK}"), named)
        await c.post("/v1/chat/completions", chat_body(f"sim:{ADMIN}"))
        more = ("--url", c.url, "--out", str(target), "--config", str(config))
        status, out, err = await bundle(*more)
        assert (status, err) == (0, "") and str(target) in out
        again, _, err = await bundle(*more)
        assert again == 1 and "cannot write" in err, "a file that is there is not written over"
    with tarfile.open(target) as tar:
        files = {m.name.rpartition("/")[2]: tar.extractfile(m) for m in tar.getmembers()}
        text = {name: file.read().decode() for name, file in files.items() if file is not None}
    requests = json.loads(text["admin-requests.json"])["requests"]
    assert [r["outcome"] for r in requests] == ["invalid", "invalid", "finished"]
    assert "w0" in [c["worker"] for c in requests[-1]["decision"]["candidates"]]
    (worker,) = json.loads(text["admin-live.json"])["workers"]
    assert (worker["id"], worker["state"]) == ("w0", "serving")
    assert "worker joined" in text["admin-logs.txt"]
    assert "loraplex_worker_up" in text["metrics.txt"]
    assert "loraplex" in json.loads(text["about.json"])["packages"]
    assert "api_keys_env: NAME" in text["config.yaml"]
    assert "max_num_batched_tokens: 8192" in text["config.yaml"]
    for secret in (KEY, PROMPT, LINK, ADMIN):
        assert not [name for name, content in text.items() if secret in content], secret
    assert not [name for name in text if name.endswith("failed.txt")]


async def test_no_gateway_is_one_line(tmp_path: Path) -> None:
    more = ("--url", "http://127.0.0.1:9", "--out", str(tmp_path / "x"))
    status, _, err = await bundle(*more)
    assert status == 1 and "no gateway answers" in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()
