"""Is the object server fast enough to measure with?

Command: ``python -m benchmarking server``

Held fixed: objects of 110 kB, no latency, signed requests, obstore in a process of its own with 64
threads.

Measured: requests a second, and the server's CPU a request. Its process is one core at most, so
one core over that CPU is what it can give when clients do not take its core. The bar is 5,000 a
second from one core. The first 128 requests are left out of the rate, and counted in the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarking.drive import NUM_IN_FLIGHT, drive_threads
from benchmarking.effort import Effort
from benchmarking.measure import read_server_cpu_s
from benchmarking.processes import run_in_process
from benchmarking.results import Bar, Row, make_row
from benchmarking.workload import read_photos, remote_store, serve


def measure_ceiling(effort: Effort) -> list[Row]:
    """Measure what the server gives, and what it spends on it."""
    photos = read_photos(min(200, effort.num_images))
    rates: list[float] = []
    cpu_ms: list[float] = []
    with serve(photos, 0.0, 0.0) as server:
        for _ in range(effort.repeats):
            num_before, cpu_before_s = server.counters().num_gets, read_server_cpu_s(server)
            store = remote_store(server)
            rate = run_in_process(drive_threads, store, list(photos.raw), effort.seconds)
            rates.append(rate.requests_per_s)
            num_requests = server.counters().num_gets - num_before
            cpu_ms.append((read_server_cpu_s(server) - cpu_before_s) / num_requests * 1e3)
    return [
        make_row(
            "server",
            "GETs of 110 kB from one core",
            {
                "mean_object_bytes": round(photos.mean_bytes),
                "num_in_flight": NUM_IN_FLIGHT,
                "client": "obstore",
                "repeats": effort.repeats,
                "seconds": effort.seconds,
            },
            {
                "one_core_requests_per_s": [1e3 / spent_ms for spent_ms in cpu_ms],
                "requests_per_s": rates,
                "server_cpu_ms_per_request": cpu_ms,
            },
            Bar(figure="one_core_requests_per_s", bound=5000),
        )
    ]


CASES: dict[str, Callable[[Effort], list[Row]]] = {"ceiling": measure_ceiling}
BARS = tuple(CASES)
