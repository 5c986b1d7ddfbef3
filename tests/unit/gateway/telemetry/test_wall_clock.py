"""Pure. The offset between the clock of requests and the wall clock."""

from __future__ import annotations

from gateway.telemetry.wall_clock import CLOSE_S, wall_offset

EPOCH_S = 1.8e9


class Machine:
    """Two clocks of one machine, which is put aside at the given reads of either one."""

    def __init__(self, aside_s: dict[int, float]) -> None:
        self.aside_s, self.reads, self.now = aside_s, 0, 100.0

    def clock(self) -> float:
        return self._read()

    def wall(self) -> float:
        return EPOCH_S + self._read()

    def _read(self) -> float:
        self.now += 1e-7 + self.aside_s.get(self.reads, 0.0)
        self.reads += 1
        return self.now


def test_a_process_that_is_put_aside_between_the_two_clocks_reads_them_again() -> None:
    for late_read in (1, 2):
        machine = Machine({late_read: 0.25})
        assert abs(wall_offset(machine.clock, machine.wall) - EPOCH_S) < CLOSE_S
        assert machine.reads == 6


def test_where_no_read_is_close_the_closest_counts_and_it_ends() -> None:
    machine = Machine({read: 0.001 if read == 7 else 0.01 for read in range(1000)})
    assert abs(wall_offset(machine.clock, machine.wall) - EPOCH_S) < 0.006
    assert machine.reads < 30
