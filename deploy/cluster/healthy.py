"""Shell. A container's health check: exit 0 if the gateway lives, or if it holds the lease of a
worker that serves.

python3 healthy.py URL [WORKER]
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0  # below the 5 s after which the check counts as failed anyway


def unhealthy(url: str, worker: str | None) -> str | None:
    """Why not, or None."""
    try:
        with urllib.request.urlopen(
            url + ("/health" if worker is None else "/metrics"), timeout=TIMEOUT_S
        ) as answer:
            text = answer.read().decode()
    except (OSError, urllib.error.URLError) as exc:
        return f"{url}: {exc}"
    if worker is None:
        return None
    wanted = (f'worker="{worker}"', 'state="serving"')
    lines = (line for line in text.splitlines() if line.startswith("loraplex_worker_up{"))
    return (
        None
        if any(all(label in line for label in wanted) for line in lines)
        else f"{worker} does not serve"
    )


def main(argv: list[str]) -> int:
    reason = unhealthy(argv[0], argv[1] if len(argv) > 1 else None)
    if reason:
        print(reason, file=sys.stderr)  # noqa: T201 - what `docker inspect` shows
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
