"""The model of a request that names none."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.accounts.account import ANONYMOUS, Account
from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import AliasState
from gateway.adapters.resolver import Resolver
from gateway.fleet.fleet import Fleet
from gateway.telemetry.prometheus import Metrics
from shared.errors import InvalidRequest
from shared.runtime.state_file import StateFile


def resolver(folder: Path, *bases: str) -> Resolver:
    aliases = AliasStore({}, StateFile(folder / "aliases.json", AliasState), Metrics())
    return Resolver(dict.fromkeys(bases), aliases, Fleet(3.0))


def test_it_is_the_only_one_that_the_key_may_use(tmp_path: Path) -> None:
    three = resolver(tmp_path, "red", "blue-1", "blue-2")
    assert three.default(Account("r", models=("red",))) == "red"
    assert resolver(tmp_path, "red").default(ANONYMOUS) == "red"


def test_where_there_are_several_those_of_others_are_not_named(tmp_path: Path) -> None:
    three = resolver(tmp_path, "red", "blue-1", "blue-2")
    for models, named in ((("blue-*",), "blue-1, blue-2."), (("green",), "there are: .")):
        with pytest.raises(InvalidRequest) as refused:
            three.default(Account("b", models=models))
        assert refused.value.message.endswith(named) and "red" not in refused.value.message
    with pytest.raises(InvalidRequest, match="red, blue-1, blue-2"):
        three.default(ANONYMOUS)
