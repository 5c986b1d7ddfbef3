"""Shell. The `loraplex` command: its verbs, their options, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from gateway.cli import adapters as adapter_commands
from gateway.cli import advise as advise_command
from gateway.cli import aliases as alias_commands
from gateway.cli import bundle as bundle_command
from gateway.cli import chat as chat_command
from gateway.cli import check, completion
from gateway.cli import keys as key_commands
from gateway.cli import rollout as rollout_command
from gateway.cli import status as status_command
from gateway.cli import top as top_command
from gateway.cli import why as why_command
from loraplex import __version__
from loraplex.start import STOPPED, command
from shared.config.deployment import MAX_WORKERS
from shared.config.llm import TARGET_SHARE, LLMConfig, Settings
from shared.config.settings_file import FollowedConfig, read_settings
from shared.errors import ConfigError, LoraplexError
from shared.option_numbers import port
from shared.runtime.process import follow_parent

UNREAD = 141
"""The exit status of a command whose output nobody reads any more, as shells have it."""
DESCRIPTION = """\
Serve many LoRA fine-tunes of one base model behind one OpenAI-compatible endpoint.

  loraplex serve CONFIG      gateway and workers, all on this machine
  loraplex gateway CONFIG    only the gateway; workers connect to it from anywhere
  loraplex worker CONFIG --gateway tcp://HOST:PORT    one worker (a GPU or a tensor-parallel group)
  loraplex chat MODEL        talk to a model or an adapter in the terminal
  loraplex status            workers of a running gateway: wanted, present, and why
  loraplex top               the fleet of a running gateway, live
  loraplex advise            how many slots and workers the traffic needs, and what to pin
  loraplex why REQUEST_ID    what a request waited for, and what would have made it faster
  loraplex bundle            one file with all that a running gateway knows of itself
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
    _take_any_text()
    try:
        status = _run(_parser().parse_args(argv))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does
        _drop_output()
        return UNREAD
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        _drop_output()
        print(f"loraplex: the output cannot be written: {exc.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("stopped", file=sys.stderr)
        return STOPPED
    return status


def _drop_output() -> None:
    """What is printed from now on goes nowhere, and so does what waits to be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace) -> int:
    if args.verb is None:
        _parser().print_help()
        return 0
    try:
        return int(args.run(args))
    except LoraplexError as exc:
        print(f"loraplex {args.verb}: {exc.message}", file=sys.stderr)
        return 2


def _take_any_text() -> None:
    """What a terminal cannot show is shown escaped, and what is no text there is replaced."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplex",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loraplex {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    _add_serve(verbs)
    _add_gateway(verbs)
    _add_worker(verbs)
    _add_check(verbs)
    _add_bench(verbs)
    _add_completion(verbs)
    chat_command.add_parser(verbs)
    status_command.add_parser(verbs)
    rollout_command.add_parser(verbs)
    why_command.add_parser(verbs)
    top_command.add_parser(verbs)
    bundle_command.add_parser(verbs)
    advise_command.add_parser(verbs)
    adapter_commands.add_parser(verbs)
    alias_commands.add_parser(verbs)
    key_commands.add_parser(verbs)
    return parser


def _add_serve(verbs: Any) -> None:
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


def _add_gateway(verbs: Any) -> None:
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


def _add_worker(verbs: Any) -> None:
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
        help="control endpoint of a gateway process, or dns://NAME:PORT for one at each address of "
        "a name; repeatable",
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
    worker.add_argument(
        "--probe-port",
        type=port,
        metavar="PORT",
        help="answer GET /live, /started and /ready there, for Kubernetes",
    )
    worker.set_defaults(run=_worker)


def _add_check(verbs: Any) -> None:
    check = verbs.add_parser(
        "check",
        help="check a config",
        description="Check a config, including engine_kwargs against vLLM's own arguments.",
    )
    check.add_argument("config", metavar="CONFIG")
    check.set_defaults(run=_check)


def _add_bench(verbs: Any) -> None:
    bench = verbs.add_parser("bench", help="measure a running server")
    bench.add_argument("what", choices=["load"], help="see `loraplex bench load --help`")


def _add_completion(verbs: Any) -> None:
    complete = verbs.add_parser(
        "completion",
        help="a script for the shell",
        description="Prints what completes this command in a shell: "
        "source <(loraplex completion bash)",
    )
    complete.add_argument("shell", choices=completion.SHELLS)
    complete.set_defaults(run=_completion)


def _load(path: str) -> Settings:
    settings = read_settings(path)
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return settings


def _serve(args: argparse.Namespace) -> int:
    def read() -> Settings:
        return _with_options(args, read_settings(args.config, again=True))

    return serve(_with_options(args, _load(args.config)), read)


def _with_options(args: argparse.Namespace, settings: Settings) -> Settings:
    for option in ("host", "port"):
        if getattr(args, option) is not None:
            settings = _with_option(settings, option, getattr(args, option))
    if args.workers is not None:
        settings = _with_workers(settings, args.workers)
    return settings


def serve(settings: Settings, read: Callable[[], Settings] | None = None) -> int:
    """Runs everything until Ctrl-C; for the verb and for `loraplex.run`. `read` reads the settings
    anew when their file has changed.
    """
    from gateway.supervisor.supervisor import supervise
    from shared.runtime import log as runtime_log

    follow_parent()
    runtime_log.set_up("serve", settings.gateway.log_level)

    config = FollowedConfig(settings.source, settings, read or (lambda: settings))
    return uvloop.run(
        supervise(settings, config, _say, lambda port, example: _greet(settings, port, example))
    )


def _say(line: str) -> None:
    """To the person at the terminal, who may have closed it."""
    with contextlib.suppress(OSError):
        print(f"==> {line}", file=sys.stderr, flush=True)


def _greet(settings: Settings, port: int, example: str | None) -> None:
    """The address and three lines to try, on stdout, once everything serves."""
    g = settings.gateway
    host = "127.0.0.1" if g.host in ("0.0.0.0", "::") else g.host
    scheme = "https" if g.tls.certificate else "http"
    url = f"{scheme}://{host}:{port}"
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
    text = (
        f"\nLoraplex serves at {url}/v1  (Ctrl-C stops it)\n\n"
        f"  curl {url}/v1/models{key}\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
        f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{stream}'\n"
        f"  {_this_command()} adapters ls --url {url}\n"
    )
    try:
        print(text, flush=True)
    except OSError:  # a full disk, or nobody who reads it, is no reason to stop serving
        _drop_output()


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
    if workers > MAX_WORKERS:
        raise ConfigError(f"--workers {workers}: at most {MAX_WORKERS}")
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
    rest += ["--probe-port", str(args.probe_port)] if args.probe_port is not None else []
    os.execv(sys.executable, command("worker", args.config, *rest))


def _completion(args: argparse.Namespace) -> int:
    print(completion.script(args.shell, completion.words(_parser())), end="")
    return 0


def _check(args: argparse.Namespace) -> int:
    settings = _load(args.config)
    if any(m.llm_engine == "vLLM" for m in settings.models):
        for warning in check.warnings():
            print(f"warning: {warning}", file=sys.stderr)
    if any(m.llm_engine == "vLLM" and m.engine_kwargs for m in settings.models):
        found = check.problems(settings)
        if found:
            raise ConfigError("\n".join(found))
    errors, notes = check.look_at_stores(settings)
    if errors:
        raise ConfigError("\n".join(errors))
    for m in settings.models:
        gpus = f", {m.gpus_per_worker} GPU each" if m.gpus_per_worker else ""
        adapters = (
            f"adapters from {m.adapters_path}, {_slots(m)} a worker"
            if m.adapters_path
            else "no adapters"
        )
        print(f"{m.model_id}: {m.llm_engine}, {m.workers} worker(s){gpus}, {adapters}")
        if (line := _scaling_line(m)) is not None:
            print(f"  {line}")
        if (missing := check.missing_policy(m)) is not None:
            print(f"warning: {m.model_id}: {missing}", file=sys.stderr)
        if m.llm_engine == "vLLM":
            for missing in check.missing_model_folders(m):
                print(f"warning: {missing}", file=sys.stderr)
    g = settings.gateway
    for missing in check.missing_gateway_files(g):
        print(f"warning: {missing}", file=sys.stderr)
    for note in notes:
        print(note)
    scheme = "https" if g.tls.certificate else "http"
    print(f"gateway: {scheme}://{g.host}:{g.port}, {g.processes} process(es)\nok")
    return 0


def _slots(model: LLMConfig) -> str:
    if model.given_max_loras is None and model.gpus_per_worker:
        return "as many slots as the GPU has room for"
    return f"{model.max_loras} slots"


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
