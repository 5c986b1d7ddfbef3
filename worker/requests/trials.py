"""Pure. Which requests may be on this worker together, if some of them may kill workers. Gateways
cannot keep to it alone, because several give requests to the same worker.
"""

from __future__ import annotations

from shared.link.messages import SUSPECTED


class Trial:
    """A request of which `deaths` workers died, as it seems. With `to_its_end` progress proves
    nothing. `what` is the same for each copy of the request.
    """

    __slots__ = ("deaths", "over", "to_its_end", "what")

    def __init__(self, what: object, deaths: int, to_its_end: bool) -> None:
        self.what = what
        self.deaths = deaths
        self.to_its_end = to_its_end
        self.over = False

    def progressed(self) -> None:
        self.over = not self.to_its_end


class OpenTrials:
    """The trials of the open requests, by their numbers."""

    def __init__(self) -> None:
        self._trials: dict[int, Trial] = {}

    def admits(self, what: object, deaths: int) -> bool:
        """Whether a request of which so many workers died may come in now. One that is suspected
        shares the worker with no other one of which any died, but for copies of it. So if the
        worker dies, it was this one.
        """
        if not deaths:
            return True
        others = (t for t in self._trials.values() if not t.over and t.what != what)
        most = max((trial.deaths for trial in others), default=0)
        return not most or max(most, deaths) < SUSPECTED

    def begin(self, number: int, what: object, deaths: int, to_its_end: bool) -> Trial:
        trial = self._trials[number] = Trial(what, deaths, to_its_end)
        return trial

    def end(self, number: int) -> None:
        """Idempotent. The request is on this worker no more."""
        self._trials.pop(number, None)
