"""gRPC calls as fast as they are answered, from one process: PLACE METHOD REQUEST_FILE CALLERS SECONDS.

Python's own client.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import uvloop


async def measure(place: str, method: str, request: bytes, callers: int, seconds: float) -> dict[str, int]:
    """Requests, their time, failures and latencies, as wrk's script prints them."""
    latencies: list[float] = []
    failed = 0
    async with grpc.aio.insecure_channel(place, options=[("grpc.max_receive_message_length", -1)]) as channel:
        # Bytes as they are: neither side's message classes are measured here.
        call = channel.unary_unary(method)
        begin = time.perf_counter()

        async def caller() -> None:
            nonlocal failed
            while (asked := time.perf_counter()) < begin + seconds:
                try:
                    await call(request, timeout=30)
                except grpc.aio.AioRpcError:
                    failed += 1
                else:
                    latencies.append(time.perf_counter() - asked)

        await asyncio.gather(*(caller() for _ in range(callers)))
        spent = time.perf_counter() - begin
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (0, 0)
    return {
        "requests": len(latencies),
        "microseconds": int(spent * 1e6),
        "failed": failed,
        "p50_us": int(p50 * 1e6),
        "p99_us": int(p99 * 1e6),
    }


if __name__ == "__main__":
    place, method, path, callers, seconds = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measure(place, method, Path(path).read_bytes(), int(callers), float(seconds)))))
