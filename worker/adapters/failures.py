"""Pure. The adapters that failed a moment ago. They are not tried again at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.adapters.identity import AdapterRef
from worker.adapters.instructions import Reject

FAILED_FOR_S = 5.0
"""A failing adapter is not tried again within this time."""
MAX_FAILED = 10_000
"""Failures that are remembered; the oldest one is forgotten first."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an adapter cannot be served. It is not tried again before `until`."""

    code: str
    message: str
    retryable: bool
    until: float = 0.0


class FailedAdapters:
    """The recent failures of one worker, by adapter."""

    def __init__(self) -> None:
        self._failures: dict[AdapterRef, Failure] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def note(self, adapter: AdapterRef, failure: Failure, now: float) -> None:
        """The adapter has failed now."""
        self._failures[adapter] = replace(failure, until=now + FAILED_FOR_S)
        while len(self._failures) > MAX_FAILED:
            del self._failures[next(iter(self._failures))]

    def reject(self, request: int, adapter: AdapterRef, now: float) -> Reject | None:
        """A rejection of the request, if the adapter failed less than FAILED_FOR_S ago."""
        failure = self._failures.get(adapter)
        if failure is None:
            return None
        if now < failure.until:
            return Reject(request, failure.code, failure.message, failure.retryable)
        del self._failures[adapter]
        return None
