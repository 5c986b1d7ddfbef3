"""Shell. `python -m tests.conformance` (`make conformance`): every request to Loraplex and to
vLLM's own server. Differences are listed by kind; one that is not meant makes the status 1.

    python -m tests.conformance                      # all
    python -m tests.conformance --only messages      # cases with this in their name
    python -m tests.conformance --all                # the meant differences one by one, too
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from shared.runtime.children import Zygote
from tests.conformance.answers import Difference, differences
from tests.conformance.audio_cases import audio_cases
from tests.conformance.cases import Case, all_cases
from tests.conformance.meant import Meant, meant
from tests.conformance.servers import ENV, Pair, both


async def compare(pair: Pair, cases: list[Case]) -> list[tuple[Case, Difference, Meant | None]]:
    """One after the other: what runs beside a request may change the last digits of its sums."""
    found = []
    for case in cases:
        ours, theirs = await pair.ask(case)
        found += [(case, d, meant(case, d)) for d in differences(ours, theirs)]
    return found


def report(cases: list[Case], found: list[tuple[Case, Difference, Meant | None]]) -> str:
    unmeant: dict[str, list[tuple[Case, Difference]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for case, difference, why in found:
        if why is None:
            unmeant[f"{difference.kind} {difference.where}".strip()].append((case, difference))
        else:
            counts[f"{why.here} | vLLM: {why.there}"] += 1
    lines = [f"{len(cases)} requests; answers that differ as meant:"]
    lines += [f"  {count:4}  {name}" for name, count in counts.most_common()]
    lines += [f"not meant: {sum(map(len, unmeant.values()))}"]
    for kind, pairs in sorted(unmeant.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {kind}: {len(pairs)}")
        lines += [
            f"    {case.name}\n      ours: {d.ours}\n      vLLM: {d.theirs}" for case, d in pairs
        ]
    return "\n".join(lines)


async def _main(flags: argparse.Namespace) -> int:
    cases = [c for c in (*all_cases(), *audio_cases()) if flags.only in c.name]
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        zygote = await Zygote.open(ENV | {"VLLM_LOGGING_LEVEL": "ERROR"})
        try:
            async with both(zygote, Path(folder), cases) as pair:
                found = await compare(pair, cases)
        finally:
            await zygote.close()
    print(report(cases, found))
    if flags.all:
        for case, difference, why in found:
            if why is not None:
                print(f"{case.name}\n  ours: {difference.ours}\n  vLLM: {difference.theirs}")
    return 1 if any(why is None for _, _, why in found) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--all", action="store_true", help="meant differences one by one")
    return asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
