"""One worker with logins that wait for WeChat, many slow clients, and reads beside them; `make waiting` measures it."""

import asyncio
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from bench import WIDE_LIMITS
from bench.load import Outcome, Request, open_loop, statuses
from bench.speed import read
from bench.waiting import SLOW_COME_SECONDS, burst, slow_clients
from dev.run import free_port
from tests.harness import Process, Service, Simulator

WECHAT_SECONDS, SLOW_SECONDS = 3, 4
LOGINS, LOGINS_COME_SECONDS, SLOW_CLIENTS, READS_A_SECOND = 150, 4, 1000, 20


async def all_at_once(port: int, token: str) -> tuple[list[Outcome], list[Outcome], list[float]]:
    ended: list[float] = []
    slow = slow_clients(port, token, SLOW_CLIENTS, ended)
    reads = open_loop(port, [Request("read", read(token))] * 1000, READS_A_SECOND, SLOW_COME_SECONDS + SLOW_SECONDS + 2)
    beside, logins = await asyncio.gather(reads, burst(port, LOGINS, LOGINS_COME_SECONDS))
    for client in slow:
        client.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    return logins, beside, ended


def test_neither_waiting_logins_nor_slow_clients_keep_reads_out(
    start_service: Callable[..., Service], simulator: Simulator, tmp_path: Path
) -> None:
    wechat = free_port("a port", "0")
    stub = Process(["bench.wechat_stub", str(wechat), str(WECHAT_SECONDS)], dict(os.environ), tmp_path / "stub")
    try:
        service = start_service(
            WEB_CONCURRENCY="1",
            WECHAT_API_BASE_URL=f"http://127.0.0.1:{wechat}",
            HEAD_SECONDS=str(SLOW_SECONDS),
            BODY_SECONDS=str(SLOW_SECONDS),
            REQUEST_SECONDS="30",
            **WIDE_LIMITS,
        )
        token = service.log_in(simulator)
        logins, reads, ended = asyncio.run(all_at_once(int(service.environ["PORT"]), token))
    finally:
        stub.kill()
    for outcomes in (reads, logins):
        # A machine that is busy with other tests cannot serve them all.
        assert set(statuses(outcomes)) <= {200, 503}
        assert statuses(outcomes)[200] > len(outcomes) / 2
    refused = [outcome.answer for outcome in logins if outcome.status == 503]
    assert all(answer and b"\r\nRetry-After: " in answer.head for answer in refused)
    assert len(ended) >= SLOW_CLIENTS
    assert statistics.median(ended) > SLOW_SECONDS - 1  # a few may have been refused at once
