"""Pure. One machine's GPUs for the workers of several models: who gets how many workers, and which
devices each worker owns.

Every model gets its min_replicas first, in the order of the file. What is left goes one worker at a
time to the model that lacks the largest share of what it wants; of equals to the one that has the
worker already, then to the first in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model wants. `gpus` are those of one worker; 0: its workers take none."""

    model: str
    gpus: int
    least: int
    wanted: int
    present: int = 0


def share(claims: Sequence[Claim], total: int) -> dict[str, int]:
    """Workers that each model may have now, on `total` GPUs."""
    granted = {claim.model: 0 for claim in claims}
    free = total
    for claim in claims:
        asked = min(claim.least, claim.wanted)
        count = asked if not claim.gpus else min(asked, free // claim.gpus)
        granted[claim.model] = count
        free -= count * claim.gpus
    while True:
        open_claims = [c for c in claims if granted[c.model] < c.wanted and c.gpus <= free]
        if not open_claims:
            return granted
        chosen = min(open_claims, key=lambda claim: _turn(claim, granted[claim.model]))
        granted[chosen.model] += 1
        free -= chosen.gpus


def _turn(claim: Claim, has: int) -> tuple[float, bool]:
    """The lowest is next; of equals `min` takes the first."""
    return (has / claim.wanted, has >= claim.present)


class Devices:
    """The devices of this machine and their owners. An owner keeps its devices until it has gone,
    so no two processes ever hold one.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._free = list(ids)
        self._order = {name: n for n, name in enumerate(ids)}
        self._owned: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def take(self, owner: str, count: int) -> tuple[str, ...] | None:
        """So many devices, or None while too few are free."""
        assert owner not in self._owned
        if count > len(self._free):
            return None
        mine, self._free = tuple(self._free[:count]), self._free[count:]
        self._owned[owner] = mine
        return mine

    def give_back(self, owner: str) -> None:
        """Idempotent."""
        self._free = sorted([*self._free, *self._owned.pop(owner, ())], key=self._order.__getitem__)
