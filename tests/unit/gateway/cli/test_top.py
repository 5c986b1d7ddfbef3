"""Pure. What `loraplex top` shows of one state, in terminals of several sizes."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.cli.top import screen


def event(workers: int, **first: Any) -> dict[str, Any]:
    rows = [
        {
            "id": f"w{n}",
            "base": "a-model-with-a-long-name",
            "state": "serving",
            "load": 3,
            "capacity": 256,
            "slots_busy": 1,
            "slots_loaded": 16,
            "slots": 16,
            "kv_usage": 0.5,
            "step_ms": 12.25,
            "load_ms": 62.5,
            "stall_ms": 7.1,
            "moved": 0,
            "restarts": 0,
            "reason": "",
        }
        for n in range(workers)
    ]
    if rows:
        rows[0] |= first
    models = {"m": {"present": workers, "queued": 2, "wanted": 9, "scales": True, "reason": "why"}}
    return {
        "workers": rows,
        "scaling": {"models": models},
        "open_requests": 7,
        "policy": "expected_ttft",
    }


REQUESTS = [
    {
        "id": f"r{n}" * 12,
        "at": str(n),
        "base": "m",
        "adapter": "a",
        "worker": "w0",
        "outcome": "finished",
        "code": None,
        "engine_status": None,
        "tier": "gpu",
        "ttft_ms": 3.0,
        "total_ms": 50.0,
    }
    for n in range(10)
]


@pytest.mark.parametrize("workers", [0, 1, 4, 64])
@pytest.mark.parametrize("requests", [0, 10])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10), (20, 5)])
def test_a_state_fits_the_terminal(workers: int, requests: int, width: int, height: int) -> None:
    lines = screen(event(workers), REQUESTS[:requests], width, height)
    assert len(lines) < height and all(len(line) <= width for line in lines)
    assert lines[0].startswith("m: ")


def test_80_by_24_keeps_what_tells_most_and_says_how_many_workers_it_leaves_out() -> None:
    lines = screen(event(64, state="draining", reason="by an operator"), REQUESTS, 80, 24)
    text = "\n".join(lines)
    assert "draining" in text and "by an operator" in text and "3/256" in text
    shown = sum(line.startswith("w") and "serving" in line for line in lines)
    assert f"... and {63 - shown} more" in text and shown >= 5
    assert sum(line.startswith("r") for line in lines) >= 3


def test_a_fleet_without_workers_says_whether_any_is_wanted() -> None:
    asleep = event(0)
    for wanted, said in ((1, "Why none starts"), (0, "The next request starts one")):
        asleep["scaling"]["models"]["m"]["wanted"] = wanted
        assert said in "\n".join(screen(asleep, []))


def test_without_a_terminal_everything_is_shown() -> None:
    lines = screen(event(64), REQUESTS)
    assert sum("serving" in line for line in lines) == 64 and "stall ms" in "\n".join(lines)
    assert sum("finished" in line for line in lines) == 10


def test_what_a_worker_says_of_itself_cannot_steer_the_terminal() -> None:
    text = "".join(screen(event(1, reason="\x1b[2Jgone\nw9 serving"), [], 200, 24))
    assert "\x1b" not in text and "\n" not in text
