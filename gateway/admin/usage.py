"""Shell. `GET /admin/usage?since=&until=&by=`: what each key used, from the usage ledger."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from aiohttp import web

from gateway.accounts.ledger import COLUMNS, PERIODS, Ledger
from gateway.admin.parameters import Handler
from gateway.http.json_responses import to_json
from shared.errors import InvalidRequest

PATH = "/admin/usage"
DAY_S = 86_400.0
FAR = 1e11
"""The latest time that is accepted, in seconds of the Unix epoch (the year 5138)."""


class UsageAdmin:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {("GET", PATH): self.show}

    async def show(self, request: web.BaseRequest) -> web.Response:
        """The sums between two times. Raises InvalidRequest for a query that it cannot read."""
        now = time.time()
        since = _moment("since", request.query.get("since"), now - DAY_S)
        until = _moment("until", request.query.get("until"), now + 1.0)
        by = _columns(request.query.get("by", "key"))
        usage = await self._ledger.query(since, until, by)
        body = {"since": since, "until": until, "by": by, "usage": usage}
        return web.Response(
            body=to_json(body),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )


def _moment(name: str, given: str | None, default: float) -> float:
    """Seconds of the Unix epoch, from such a number, a date, or a time (UTC unless it has an
    offset).
    """
    if given is None:
        return default
    try:
        found = float(given)
    except ValueError:
        try:
            when = datetime.fromisoformat(given)
        except ValueError as exc:
            raise InvalidRequest(
                f"`{name}` must be seconds since 1970, a date or a time like 2027-01-31T12:00:00Z.",
                param=name,
            ) from exc
        found = (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    if not 0 <= found <= FAR:
        raise InvalidRequest(f"`{name}` is no time that there can be usage of.", param=name)
    return found


def _columns(given: str) -> list[str]:
    by = [word for word in given.split(",") if word]
    known = (*COLUMNS, *PERIODS)
    if len(set(by)) != len(by) or not set(by) <= set(known):
        raise InvalidRequest(f"`by` takes {', '.join(known)}, separated by commas.", param="by")
    return by
