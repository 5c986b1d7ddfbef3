"""Pure. `loraplex completion SHELL`: a script that completes verbs, options and file names. It is
made from the parser of the `loraplex` command.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

SHELLS = ("bash", "zsh", "fish")
_BASH = """\
_loraplex() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} options
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -F _loraplex loraplex
"""
# a zsh without a configuration of its own has no `compdef`
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i; }
autoload -U +X bashcompinit && bashcompinit
"""


def words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Verb -> what may follow it: its own verbs, and its options."""
    return {verb: _after(below) for verb, below in _verbs(parser).items()}


def script(shell: str, after: Mapping[str, list[str]]) -> str:
    """The script for `source <(loraplex completion bash)`, or for `| source` in fish."""
    verbs = " ".join(after)
    if shell == "fish":
        lines = [f"complete -c loraplex -n __fish_use_subcommand -f -a '{verbs}'"]
        for verb, following in after.items():
            lines.append(
                f"complete -c loraplex -n '__fish_seen_subcommand_from {verb}' "
                f"-a '{' '.join(following)}'"
            )
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'    {verb}) options="{" ".join(w)}" ;;' for verb, w in after.items())
    begin = _ZSH if shell == "zsh" else ""
    return begin + _BASH.format(verbs=verbs, cases=cases)


def _verbs(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    # argparse has no public way to its verbs
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _after(parser: argparse.ArgumentParser) -> list[str]:
    options = [
        option
        for below in (parser, *_verbs(parser).values())
        for action in below._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    return [*_verbs(parser), *dict.fromkeys(options)]
