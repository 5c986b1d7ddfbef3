"""Shell. `python -m bench.routing`: routing policies compared in virtual time, with the gateway's
production code and simulated workers, in parts of any length on any number of machines.

    python -m bench.routing --compare ray,expected-ttft --scenario fits --seeds 3 --report fits
    python -m bench.routing --estimate
    python -m bench.routing --jobs 14 --seconds 460 --out study
    python -m bench.routing --out study --have elsewhere/items.jsonl --report study/routing

No sockets, no sleeping, no model: the gateway's dispatcher, fleet, policies and admission, the
worker's residency and slots, and the messages between them run as they are. Clocks, sockets and
engines are simulated, engines by a table measured on an H200 (bench/routing/sim/timing.py). The
same command gives the same figures.

A plan (default: bench/routing/plans/routing.json; its words are in bench/routing/study/plan.py)
becomes independent runs of at most about two minutes. `--compare` is a plan of one comparison. Each
run that ends is one line of OUT/items.jsonl; the next call goes on from there and from what is in
--have. What runs at the deadline is killed and done again. `--redo ray` counts runs of that policy
only if they are of today's code; without it a result stays good when code changes, with a warning.

--report runs nothing, unless --compare is given. It writes NAME.json, NAME.md and, with matplotlib,
pictures. It reports what there is and says what is missing.

Exit status: 0, nothing is left (or the report is written); 1, runs are left; 2, flags or a plan
that make no sense; 3, runs failed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import logging
import multiprocessing
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from bench.routing.process_pool import ProcessPool
from bench.routing.report import plot
from bench.routing.sim import clairvoyant, engine, pooled, production, world
from bench.routing.sim.production import policies
from bench.routing.sim.scenarios import SCENARIOS, WORKERS
from bench.routing.study import runs, search
from bench.routing.study.item import DoneItem, Item, Results, perform, still_good
from bench.routing.study.merged import markdown, merge
from bench.routing.study.plan import Plan, needed, read_plan, rehearse

PLAN = Path(__file__).parent / "plans" / "routing.json"
ITEMS = "items.jsonl"
SLOWER = 1.5
"""A run may take so many times what is expected of it: one that is not expected to end before the
deadline is not begun.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(arguments)
    try:
        plan = _plan(flags)
        done = read(_files(flags))
    except (OSError, msgspec.DecodeError) as exc:
        print(f"bench.routing: {exc}", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "bench.routing", *given])
    if flags.report and not flags.compare:
        _report(plan, still_good(done, flags.redo), flags, command)
        return 0
    code = code_digest()
    kept = still_good(done, flags.redo, code)
    _warn_of_old_code(kept, code)
    results = Results(kept)
    if flags.estimate:
        print(estimate(plan, results, flags.jobs))
        return 0
    flags.out.mkdir(parents=True, exist_ok=True)
    _mend(flags.out / ITEMS)
    with (flags.out / ITEMS).open("a") as file:
        status = run(plan, results, flags, code, file)
    if flags.report and status != 3:
        _report(plan, read(_files(flags)), flags, command)
    return status


def _plan(flags: argparse.Namespace) -> Plan:
    """Raises: OSError; msgspec.DecodeError."""
    if not flags.compare:
        return read_plan(flags.plan.read_bytes())
    question = {
        "ask": "compare",
        "policies": flags.compare,
        "scenarios": [flags.scenario],
        "seeds": flags.seeds,
        "workers": flags.workers,
        "loads": flags.loads,
    }
    return read_plan(msgspec.json.encode([question]))


def run(plan: Plan, results: Results, flags: argparse.Namespace, code: str, file: TextIO) -> int:
    """Until the deadline or the end. Every result is in the file before the next run begins."""
    began = time.monotonic()
    deadline = began + flags.seconds
    failed: set[Item] = set()
    ended, cpu_s, expected_s = 0, 0.0, 0.0
    with ProcessPool(do, flags.jobs, quiet) as pool:
        while time.monotonic() < deadline:
            pace = cpu_s / expected_s if expected_s else 1.0
            _fill(pool, plan, results, failed, (deadline - time.monotonic()) / pace / SLOWER)
            if not pool.jobs:
                break
            for end in pool.ended(deadline):
                if end.error:
                    failed.add(end.job)
                    print(f"failed: {end.job.name}\n{end.error}", file=sys.stderr, flush=True)
                    continue
                row = DoneItem(end.job, end.result, round(end.cpu_s, 3), time.time(), code)
                file.write(msgspec.json.encode(row).decode() + "\n")
                file.flush()
                results.add(row.item, row.result)
                ended, cpu_s, expected_s = (
                    ended + 1,
                    cpu_s + end.cpu_s,
                    expected_s + end.job.estimate_s,
                )
        killed = len(pool.jobs)
    print(
        f"{ended} runs in {time.monotonic() - began:.0f} s, {cpu_s:.0f} s of processor "
        f"time (expected: {expected_s:.0f}); {killed} killed"
    )
    if failed:
        return 3
    print(left := estimate(plan, results, flags.jobs))
    return int(not left.startswith(NOTHING))


def _fill(
    pool: ProcessPool[Item], plan: Plan, results: Results, failed: set[Item], within_s: float
) -> None:
    """Gives every idle process the first run that is ready, short enough, and not with another
    one.
    """
    if not pool.idle:
        return
    taken = set(pool.jobs) | failed
    for question in plan:
        for item in needed(question, results):
            if item not in taken and item.estimate_s < within_s:
                taken.add(item)
                pool.start(item)
                if not pool.idle:
                    return


NOTHING = "nothing is left"


def estimate(plan: Plan, results: Results, jobs: int) -> str:
    """What is left, by question. `results` are as before afterwards."""
    left = rehearse(plan, results.copy())
    lines = [f"{'question':<52}{'runs':>6}{'processor s':>13}{'longest':>9}"]
    for question, items in zip(plan, left, strict=True):
        if items:
            seconds = [item.estimate_s for item in items]
            lines.append(
                f"{question.name:<52}{len(items):>6}{sum(seconds):>13,.0f}{max(seconds):>8.0f}s"
            )
    total = sum(item.estimate_s for items in left for item in items)
    if not total:
        return f"{NOTHING} of the plan"
    return "\n".join(
        [
            *lines,
            f"about {total:,.0f} s of processor time are left: {total / jobs / 60:.0f} "
            f"min with {jobs} processes",
        ]
    )


def read(files: Iterable[Path]) -> list[DoneItem]:
    """Raises: OSError; msgspec.DecodeError for a line that is none of ours (a last line without an
    end was cut off and counts for nothing).
    """
    decoder = msgspec.json.Decoder(DoneItem)
    rows = []
    for path in files:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            if line.strip():
                try:
                    rows.append(decoder.decode(line))
                except msgspec.DecodeError as exc:
                    raise msgspec.DecodeError(f"{path}, line {number}: {exc}") from exc
    return rows


def code_digest() -> str:
    """Of all source that a run's result depends on: the production code that is loaded, and the
    simulator without what plans and reports.
    """
    ours = {
        module.__name__ for module in (clairvoyant, engine, pooled, production, runs, search, world)
    }
    ours |= {
        "bench.load.workload",
        "bench.routing.sim.agenda",
        "bench.routing.report.figures",
        "bench.routing.sim.scenarios",
        "bench.routing.sim.timing",
        "bench.routing.sim.worker",
    }
    digest = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        if (name.partition(".")[0] in ("gateway", "worker", "shared") or name in ours) and getattr(
            module, "__file__", None
        ):
            digest.update(name.encode() + b"\0" + Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:12]


def quiet() -> None:
    """In each process, before its first run. While one runs its objects only grow: the garbage
    collector would look in vain.
    """
    logging.getLogger("loraplex").setLevel(logging.ERROR)  # a lost worker is part of the experiment
    gc.disable()


def do(item: Item) -> Any:
    try:
        return perform(item)
    finally:
        gc.collect()


def _mend(path: Path) -> None:
    """Takes off a last line that was not written to its end."""
    if path.exists():
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)


def _report(plan: Plan, done: Sequence[DoneItem], flags: argparse.Namespace, command: str) -> None:
    made = merge(plan, Results(done))
    made.document |= {
        "plan": msgspec.to_builtins(plan),
        "command": command,
        "processor_s": round(sum(row.cpu_s for row in done)),
        "codes": {
            policy: sorted({r.code for r in done if r.item.policy == policy})
            for policy in sorted({r.item.policy for r in done})
        },
    }
    flags.report.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{flags.report}.json").write_text(json.dumps(made.document, indent=1) + "\n")
    Path(f"{flags.report}.md").write_text(words := markdown(made, command))
    print(words)
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
        return
    plot.plot_study(made.document, str(flags.report))


def _warn_of_old_code(done: Sequence[DoneItem], code: str) -> None:
    old = Counter(row.item.policy for row in done if row.code != code)
    if old:
        print(
            "of other code and kept: "
            + ", ".join(f"{runs} runs of {policy}" for policy, runs in sorted(old.items()))
            + " (--redo POLICY,...)"
        )


def _files(flags: argparse.Namespace) -> list[Path]:
    own = flags.out / ITEMS
    return [*flags.have, *([own] if own.exists() else [])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.routing",
        description="The whole comparison of routing policies, in parts.",
    )
    add = parser.add_argument
    add("--plan", type=Path, default=PLAN, help="the questions (%(default)s)")
    add(
        "--compare",
        type=_policies,
        metavar="POLICY,...",
        help=f"one comparison instead of a plan; of {', '.join(policies())}",
    )
    add("--scenario", choices=SCENARIOS, default="default", help="of --compare (%(default)s)")
    add("--seeds", type=int, default=3, help="of --compare (%(default)s)")
    add("--workers", type=int, default=WORKERS, help="of --compare (%(default)s)")
    add(
        "--loads",
        choices=["vllm", "own"],
        default="vllm",
        help="of --compare: adapters are loaded as vLLM does it, or as this project's workers do "
        "(%(default)s; bench/routing/sim/timing.py)",
    )
    add(
        "--jobs",
        type=int,
        default=max(1, multiprocessing.cpu_count() - 2),
        help="processes (%(default)s)",
    )
    add(
        "--seconds",
        type=float,
        default=1e6,
        help="of wall time, after which what still runs is killed (no limit)",
    )
    add(
        "--out",
        type=Path,
        default=Path("study"),
        help="where items.jsonl is continued (%(default)s)",
    )
    add(
        "--have",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="more items.jsonl, of other machines or earlier times",
    )
    add(
        "--redo",
        type=lambda text: text.split(","),
        default=[],
        metavar="POLICY,...",
        help="policies whose runs count only if of new code",
    )
    add("--estimate", action="store_true", help="say what is left and how long it takes")
    add("--report", type=Path, metavar="NAME", help="write NAME.json, NAME.md and NAME-*.png")
    return parser


def _policies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in policies()]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(policies())}")
    return names


if __name__ == "__main__":
    sys.exit(main())
