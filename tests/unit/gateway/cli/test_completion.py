"""Shell. Completion in real shells, for those that are here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from gateway.cli.completion import SHELLS, script, words
from gateway.cli.main import _parser

AFTER = words(_parser())


def completed(*typed: str) -> list[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in ("loraplex", *typed))
    asked = f"COMP_WORDS=({line}); COMP_CWORD={len(typed)}; _loraplex; echo ${{COMPREPLY[@]}}"
    ran = subprocess.run(
        ["bash", "-c", script("bash", AFTER) + asked], capture_output=True, text=True, check=True
    )
    return ran.stdout.split()


def test_bash_completes_verbs_then_their_own_verbs_and_options() -> None:
    assert completed("ser") == ["serve"]
    assert completed("serve", "--p") == ["--port"]
    assert {"ls", "load", "pin"} <= set(completed("adapters", ""))
    assert "--url" in completed("adapters", "ls", "--u")
    assert completed("nosuch", "--") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_verb_and_the_shell_reads_it(shell: str) -> None:
    made = script(shell, AFTER)
    assert all(verb in made for verb in AFTER) and "serve" in AFTER
    if shutil.which(shell):
        bare = {"bash": "--norc", "zsh": "-f", "fish": "--no-config"}[shell]
        ran = subprocess.run([shell, bare, "-c", made], capture_output=True, text=True, check=True)
        assert not ran.stdout and not ran.stderr
