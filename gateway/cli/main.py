"""Shell. The `loraplex` command. Each verb is a call; what it prints is for a person."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from gateway.cli import adapters as adapter_commands
from gateway.cli import aliases as alias_commands
from gateway.cli import chat as chat_command
from gateway.cli import check
from gateway.cli import keys as key_commands
from gateway.cli import rollout as rollout_command
from gateway.cli import status as status_command
from gateway.cli import top as top_command
from gateway.cli import why as why_command
from gateway.cli.stores import look_at_stores
from loraplex import __version__
from loraplex.start import command
from shared.config.llm import TARGET_SHARE, LLMConfig, Settings
from shared.config.settings_file import read_settings
from shared.errors import ConfigError, LoraplexError
from shared.runtime.process import follow_parent

DESCRIPTION = """\
Serve many LoRA fine-tunes of one base model behind one OpenAI-compatible endpoint.

  loraplex serve CONFIG      gateway and workers, all on this machine
  loraplex gateway CONFIG    only the gateway; workers connect to it from anywhere
  loraplex worker CONFIG --gateway tcp://HOST:PORT    one worker (a GPU or a tensor-parallel group)
  loraplex status            workers of a running gateway: wanted, present, and why
  loraplex top               the fleet of a running gateway, live
  loraplex why REQUEST_ID    what a request waited for, and what would have made it faster
  loraplex check CONFIG      say what is wrong with a config, and what it would start
  loraplex adapters ls       the adapters of a running gateway; also show, load, unload, pin, unpin,
                             prefetch, evict
  loraplex adapters validate PATH_OR_URL --config CONFIG    check an adapter as a worker would
  loraplex bench load --url http://HOST:PORT ...    a load test for any OpenAI-compatible server
  loraplex rollout           replace all workers, one after the other, without a failed request
  loraplex aliases set prod v7=90 v8=10    let a name stand for adapters, by shares; also ls, rm
  loraplex keys new NAME --file KEYS.yaml    make an API key; also ls, revoke

CONFIG is a Ray Serve LLM file (`llm_configs:` or `applications:`) plus an optional `gateway:`
section; see docs/CONFIG.md.
Ask with {"model": "BASE"} for the base model, or {"model": "BASE:ADAPTER"} for a
folder of the adapter store.
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:2]) == ["bench", "load"]:  # it reads its options itself
        os.execv(sys.executable, command("bench.load", *argv[2:]))
    args = _parser().parse_args(argv)
    if args.verb is None:
        _parser().print_help()
        return 0
    try:
        return int(args.run(args))
    except LoraplexError as exc:
        print(f"loraplex {args.verb}: {exc.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplex",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loraplex {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    serve = verbs.add_parser(
        "serve",
        help="gateway and workers on this machine",
        description="Serve everything on this machine until Ctrl-C.",
    )
    serve.add_argument("config", metavar="CONFIG")
    serve.add_argument("--host", help="listen on this address instead of gateway.host")
    serve.add_argument(
        "--port", type=int, help="listen on this port instead of gateway.port (0: any free one)"
    )
    serve.add_argument(
        "--workers", type=int, help="workers of the first model, instead of its num_replicas"
    )
    serve.set_defaults(run=_serve)
    gateway = verbs.add_parser(
        "gateway",
        help="only the gateway",
        description="One gateway process; prints where workers connect.",
    )
    gateway.add_argument("config", metavar="CONFIG")
    gateway.add_argument(
        "--index", type=int, default=0, help="number of this process, if several share one port"
    )
    gateway.set_defaults(run=_gateway)
    worker = verbs.add_parser(
        "worker",
        help="one worker",
        description="One worker; set CUDA_VISIBLE_DEVICES to choose its GPUs.",
    )
    worker.add_argument("config", metavar="CONFIG")
    worker.add_argument(
        "--gateway",
        action="append",
        default=[],
        metavar="ENDPOINT",
        help="control endpoint of a gateway process; repeatable",
    )
    worker.add_argument(
        "--model", metavar="ID", help="which model of the config, if it has several"
    )
    worker.add_argument(
        "--worker", metavar="NAME", help="a name unique in the cluster; default: host and pid"
    )
    worker.add_argument(
        "--peer-host",
        metavar="HOST[:PORT]",
        help="where other hosts' workers reach this one (see gateway.link.peer)",
    )
    worker.set_defaults(run=_worker)
    check = verbs.add_parser(
        "check",
        help="check a config",
        description="Check a config, including engine_kwargs against vLLM's own arguments.",
    )
    check.add_argument("config", metavar="CONFIG")
    check.set_defaults(run=_check)
    bench = verbs.add_parser("bench", help="measure a running server")
    bench.add_argument("what", choices=["load"], help="see `loraplex bench load --help`")
    chat_command.add_parser(verbs)
    status_command.add_parser(verbs)
    rollout_command.add_parser(verbs)
    why_command.add_parser(verbs)
    top_command.add_parser(verbs)
    adapter_commands.add_parser(verbs)
    alias_commands.add_parser(verbs)
    key_commands.add_parser(verbs)
    return parser


def _load(path: str) -> Settings:
    settings = read_settings(path)
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return settings


def _serve(args: argparse.Namespace) -> int:
    settings = _load(args.config)
    for option in ("host", "port"):
        if getattr(args, option) is not None:
            settings = _with_option(settings, option, getattr(args, option))
    if args.workers is not None:
        settings = _with_workers(settings, args.workers)
    return serve(settings)


def serve(settings: Settings) -> int:
    """Runs everything until Ctrl-C; for the verb and for `loraplex.run`."""
    from gateway.supervisor.supervisor import supervise
    from shared.runtime import log as runtime_log

    follow_parent()
    runtime_log.set_up("serve", settings.gateway.log_level)

    return uvloop.run(
        supervise(
            settings,
            lambda line: print(f"==> {line}", file=sys.stderr, flush=True),
            lambda port, model: _greet(settings, port, model),
        )
    )


def _greet(settings: Settings, port: int, example: str | None) -> None:
    """The address and three lines to try, on stdout, once everything serves."""
    g = settings.gateway
    host = "127.0.0.1" if g.host in ("0.0.0.0", "::") else g.host
    url = f"http://{host}:{port}"
    model = settings.models[0].model_id
    key = ' -H "Authorization: Bearer $KEY"' if g.asks_for_keys else ""
    body = json.dumps(
        {
            "model": example or (f"{model}:ADAPTER" if settings.models[0].adapters_path else model),
            "messages": [{"role": "user", "content": "Hello!"}],
        }
    )
    stream = json.dumps(
        {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]}
    )
    print(
        f"\nLoraplex serves at {url}/v1  (Ctrl-C stops it)\n\n"
        f"  curl {url}/v1/models{key}\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
        f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{stream}'\n"
        f"  {_this_command()} adapters ls --url {url}\n",
        flush=True,
    )


def _this_command() -> str:
    """How to call this command from the person's shell."""
    ours = Path(sys.executable).with_name("loraplex")
    found = shutil.which("loraplex")
    if not ours.exists() or (found and Path(found).resolve() == ours.resolve()):
        return "loraplex"
    return f"PATH={ours.parent}:$PATH loraplex"


def _with_option(settings: Settings, option: str, value: object) -> Settings:
    """Raises ConfigError that names the option, as the person wrote it."""
    try:
        gateway = msgspec.structs.replace(settings.gateway, **{option: value})
    except ConfigError as exc:
        why = exc.message.removeprefix(f"GatewayConfig: {option}: ")
        raise ConfigError(f"--{option} {value}: {why}") from exc
    return msgspec.structs.replace(settings, gateway=gateway)


def _with_workers(settings: Settings, workers: int) -> Settings:
    if workers < 1:
        raise ConfigError("--workers must be at least 1")
    first = settings.models[0]
    deployment = msgspec.structs.replace(
        first.deployment_config, num_replicas=workers, autoscaling_config=None
    )
    first = msgspec.structs.replace(first, deployment_config=deployment)
    return msgspec.structs.replace(settings, models=(first, *settings.models[1:]))


def _gateway(args: argparse.Namespace) -> int:
    _load(args.config)
    if args.index < 0:
        raise ConfigError(f"--index {args.index}: expected 0 or more")
    os.execv(sys.executable, command("gateway", args.config, "--index", str(args.index)))


def _worker(args: argparse.Namespace) -> int:
    _load(args.config)
    rest = [part for endpoint in args.gateway for part in ("--gateway", endpoint)]
    rest += ["--model", args.model] if args.model else []
    rest += ["--worker", args.worker] if args.worker else []
    rest += ["--peer-host", args.peer_host] if args.peer_host else []
    os.execv(sys.executable, command("worker", args.config, *rest))


def _check(args: argparse.Namespace) -> int:
    settings = _load(args.config)
    if any(m.llm_engine == "vLLM" and m.engine_kwargs for m in settings.models):
        found = check.problems(settings)
        if found:
            raise ConfigError("\n".join(found))
    errors, notes = look_at_stores(settings)
    if errors:
        raise ConfigError("\n".join(errors))
    for m in settings.models:
        gpus = f", {m.gpus_per_worker} GPU each" if m.gpus_per_worker else ""
        adapters = (
            f"adapters from {m.adapters_path}, {m.max_loras} slots a worker"
            if m.adapters_path
            else "no adapters"
        )
        print(f"{m.model_id}: {m.llm_engine}, {m.workers} worker(s){gpus}, {adapters}")
        if (line := _scaling_line(m)) is not None:
            print(f"  {line}")
    g = settings.gateway
    for note in notes:
        print(note)
    print(f"gateway: http://{g.host}:{g.port}, {g.processes} process(es)\nok")
    return 0


def _scaling_line(model: LLMConfig) -> str | None:
    """Between which bounds the model scales, and at which load."""
    scaling = model.deployment_config.autoscaling_config
    if scaling is None or not scaling.scales:
        return None
    how = (
        "as given"
        if scaling.target_ongoing_requests is not None
        else f"{TARGET_SHARE:.0%} of the {model.runs_at_once} that a worker runs at once; its own "
        "number holds once it serves"
    )
    return (
        f"scales from {scaling.min_replicas or 'zero'} to {scaling.max_replicas}: "
        "one worker for each "
        f"{model.target_ongoing_requests:g} requests ({how})"
    )


if __name__ == "__main__":
    sys.exit(main())
