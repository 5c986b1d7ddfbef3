"""Which rows a GPU run measures, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.engine.gpu import GpuRecord, GpuRow, rows
from bench.engine.gpu_flags import read_arguments
from bench.engine.gpu_report import ratios
from bench.engine.gpu_servers import BESIDE_KV_GIB, GIB, USED, shared_gpu


def test_rows_come_in_order_of_importance_and_levels_of_both_kinds_are_free() -> None:
    wanted = rows(
        read_arguments(
            [
                "--rows",
                "base,adapters",
                "--levels",
                "512,1",
                "--adapter-levels",
                "1,512",
                "--per-stream",
                "2",
            ]
        )
    )
    assert [(r.name, r.requests) for r in wanted] == [
        ("16 adapters x1", 8),
        ("16 adapters x512", 1024),
        ("base x512", 1024),
        ("base x1", 8),
    ]


@pytest.mark.parametrize(
    "argv", ["--rows zipf,foo", "--servers tgi", "--loraplex-arg eager", "--levels 0"]
)
def test_what_is_not_known_is_refused(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(argv.split())
    assert argv.split()[0] in capsys.readouterr().err


def test_servers_on_one_gpu_get_the_same_cache_and_fit_with_what_they_need_beside_it() -> None:
    for gib, servers in ((79, 2), (140, 2), (140, 4)):
        made = shared_gpu(gib * GIB, None, servers)
        each = made["kv_cache_memory_bytes"] / GIB + BESIDE_KV_GIB
        assert servers * each <= USED * gib + 0.1
        assert servers * made["gpu_memory_utilization"] == pytest.approx(USED)
    assert shared_gpu(140 * GIB, 20.0)["kv_cache_memory_bytes"] == 20 * GIB
    for memory, kv in ((48, None), (79, 20.0)):
        with pytest.raises(SystemExit):
            shared_gpu(memory * GIB, kv)


ROW = GpuRow("base x64", 0, "base", 64, 256)
LATER = GpuRow("base x1", 0, "base", 1, 8)


def figures(rate: float) -> dict[str, Any]:
    times = {"p50": 0.1, "p99": 0.2}
    return {
        "throughput": {"output_tokens_per_s": rate},
        "ttft": times,
        "itl": times,
        "requests": {"failed": 0},
    }


def test_a_row_that_was_cut_off_while_it_was_written_is_measured_again_and_spoils_no_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    GpuRecord(path, "").add("vllm", ROW, {"a": 1}, figures(100))
    path.write_text(path.read_text() + path.read_text()[:40])
    again = GpuRecord(path, "")
    assert again.has("vllm", ROW, {"a": 1})
    assert not again.has("vllm", ROW, {"a": 2}), "measured with other arguments"
    again.add("vllm", LATER, {"a": 1}, figures(10))
    assert len(GpuRecord(path, "").rows) == 2 and GpuRecord(path, "").has("vllm", LATER, {"a": 1})


def test_rows_of_several_calls_are_compared_by_label_and_differences_are_named() -> None:
    def row(server: str, rate: float, label: str = "", **arguments: Any) -> dict[str, Any]:
        return {
            "server": server,
            "label": label,
            "row": "base x64",
            "gpu": "H",
            "arguments": arguments,
            "figures": figures(rate),
        }

    done = [
        row("vllm", 50),
        row("vllm", 100),
        row("loraplex", 150),
        row("loraplex", 300, "spec", special=True),
    ]
    assert ratios(json.loads(json.dumps(done))).splitlines() == [
        "base x64: 1.500",
        "base x64 spec: 3.000 (special: True beside None)",
        "median 2.250",
    ]
    assert ratios([row("loraplex", 1)]) == "no row of both servers yet"
