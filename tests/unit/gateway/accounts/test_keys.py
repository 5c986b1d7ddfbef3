"""Key files that change while they are followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.accounts.keys import Keys
from shared.config.gateway import GatewayConfig
from shared.errors import InvalidApiKey
from tests.harness import replace_file
from tests.processes import no_descriptors_left


def test_a_key_that_was_revoked_while_descriptors_were_short_is_refused_once_there_are_some(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_text("revoked\nkept\n")
    keys = Keys(GatewayConfig(api_keys_file=str(file)))
    assert keys.account_of("Bearer revoked")
    replace_file(file, b"kept\n")
    with no_descriptors_left():
        keys.look()
    assert keys.account_of("Bearer kept")
    keys.look()
    with pytest.raises(InvalidApiKey):
        keys.account_of("Bearer revoked")
