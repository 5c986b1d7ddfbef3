"""Pure. What a scenario has shown, as a line of progress and as a row of a table."""

from __future__ import annotations

import msgspec


class ChaosRow(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario. `gap_s`: the longest time between two tokens of one stream; `first_s`: from a
    question to its first token; `load`: the machine's load average at its highest. `failure` says
    why the cluster did not recover, or what was left behind. `reconnected`: how often a client had
    to ask again because nobody had answered at all.
    """

    scenario: str
    says: str
    engine: str
    streams: int
    seconds: float
    strikes: int
    answers: int
    failed: int
    wrong: int
    moved: int
    reconnected: int
    gap_s: float
    first_s: float
    load: float
    command: str
    failure: str = ""
    examples: list[str] = []

    @property
    def holds(self) -> bool:
        return not (self.failed or self.wrong or self.failure) and self.answers > 0


HEAD = (
    "| scenario | engine | s | faults | streams | answers | failed | wrong | moved | asked again | "
    "longest gap, s | first token, s | load |"
)


def table(rows: list[ChaosRow]) -> str:
    """Markdown, with the commands that made it."""
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for row in rows:
        cells = [
            f"`{row.scenario}`: {row.says}",
            row.engine,
            f"{row.seconds:.0f}",
            row.strikes,
            row.streams,
            row.answers,
            row.failed,
            row.wrong,
            row.moved,
            row.reconnected,
            f"{row.gap_s:.2f}",
            f"{row.first_s:.2f}",
            f"{row.load:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    commands = [f"    {command}" for command in dict.fromkeys(row.command for row in rows)]
    failures = [f"{row.scenario}: {row.failure}" for row in rows if row.failure]
    examples = [example for row in rows for example in row.examples]
    return "\n".join([*lines, "", *commands, *failures, *examples])


def progress(row: ChaosRow) -> str:
    return (
        f"{row.scenario} ({row.engine}) {row.seconds:4.0f} s: {row.strikes} faults, "
        f"{row.answers} answers, {row.failed} failed, {row.wrong} wrong, {row.moved} moved, "
        f"longest gap {row.gap_s:.2f} s, load {row.load:.0f}"
    )
