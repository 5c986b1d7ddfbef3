"""Shell. Prints vLLM's arguments as JSON: name -> what its value may be. `loraplex check` reads the
copy for vLLM 0.32 in shared/config/vllm_arguments.json, and asks this in a process of its own where
another version is installed.

python -m worker.engine.vllm.arguments
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

KINDS = {int: "int", float: "float"}
TYPED = {
    "human_readable_int": "int",
    "human_readable_int_or_auto": "any",
    "nullable_kvs": "any",
}


def main() -> int:
    from vllm.version import __version__

    told = {"version": __version__, "arguments": arguments()}
    sys.stdout.write(json.dumps(told, sort_keys=True))
    return 0


def arguments() -> dict[str, dict[str, Any]]:
    """`kind` is int, float, bool, text or any; `choices` are all there is, where vLLM says so."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    known = {action.dest: _described(action) for action in parser._actions}
    known |= {name: {"kind": "any"} for name in vars(parser.parse_args([])) if name not in known}
    known["tool_call_parser"]["choices"] = sorted(ToolParserManager.list_registered())
    known["reasoning_parser"]["choices"] = sorted(ReasoningParserManager.list_registered())
    known["load_format"]["choices"] = sorted(_LOAD_FORMAT_TO_MODEL_LOADER)
    known["quantization"]["choices"] = sorted(QUANTIZATION_METHODS)
    del known["help"]
    return known


def _described(action: argparse.Action) -> dict[str, Any]:
    if isinstance(action, argparse.BooleanOptionalAction) or action.const is True:
        return {"kind": "bool"}
    kind = KINDS.get(action.type, "") if isinstance(action.type, type) else ""
    kind = kind or TYPED.get(getattr(action.type, "__name__", ""), "any")
    described: dict[str, Any] = {"kind": "any" if action.nargs else kind}
    if action.choices and not action.nargs:
        described["choices"] = sorted(map(str, action.choices))
    return described


if __name__ == "__main__":
    sys.exit(main())
