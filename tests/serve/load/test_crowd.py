"""Hundreds of clients for minutes: every answer whole and right or a polite refusal, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from load.conftest import Serve
from load.crowd import Tally, gather
from load.serving import memory_of

NUM_CLIENTS = 256
SECONDS = 90.0
WARM_UP_SECONDS = 30.0
SLACK_BYTES = 12_000_000
"""What memory may differ by without growing: arenas of the allocator, connections that are open."""


@pytest.mark.slow
def test_a_crowd_is_answered_wholly_or_refused_politely_and_leaves_nothing_behind(serve: Serve) -> None:
    # Little room and a short queue: answers are put aside and taken up again, and clients are sent away.
    server = serve("--max-num-seqs", "32", "--max-queue", "150", "--max-model-len", "4096", cache="3MB").ready()
    tally = Tally()

    async def story() -> tuple[int, int]:
        async with server.client(timeout_s=90) as client:
            await gather(client, tally, NUM_CLIENTS, WARM_UP_SECONDS)
            before = memory_of(server.process.pid), memory_of(server.engine_id)
            await gather(client, tally, NUM_CLIENTS, SECONDS)
            return before

    front_before, engine_before = asyncio.run(story())
    metrics = server.rest()
    assert memory_of(server.process.pid) < front_before + SLACK_BYTES
    assert memory_of(server.engine_id) < engine_before + SLACK_BYTES

    assert set(tally.got) <= {f"{way} {status}" for way in ("whole", "stream", "guided", "nonsense") for status in
                              (200, 400, 404, 429)} | {"cut"}  # fmt: skip
    assert min(tally.got[name] for name in ("whole 200", "stream 200", "guided 200", "nonsense 400", "cut")) > 20
    assert tally.sum("429") > 0

    def requests(status: int) -> float:
        return metrics.sum("ferry_requests_total", 'route="/v1/', f'status="{status}"')

    assert requests(429) == metrics.sum("ferry_rejections_total")
    assert tally.sum("429") <= requests(429) <= tally.sum("429") + tally.got["cut"]
    assert requests(400) == tally.sum("400")
    assert requests(404) == tally.sum("404")
    assert requests(503) == requests(500) == 0
    num_answers, num_cut = metrics.sum("ferry_answers_total"), metrics.sum("ferry_answers_cut_total")
    # A client that hung up may have done so when its answer was whole already, or before its request was read.
    assert tally.sum("200") <= num_answers <= tally.sum("200") + tally.got["cut"]
    assert requests(200) <= num_answers + num_cut <= requests(200) + requests(499)
    assert requests(200) + requests(499) <= tally.sum("200") + tally.got["cut"]
    assert num_cut == metrics.sum("ferry_answers_cut_total", 'reason="client"') > 0
    assert metrics.sum("ferry_engine_preemptions_total") > 0
    assert metrics.sum("ferry_engine_restarts_total") == 0
    assert metrics.sum("ferry_guided_answers_total", 'verdict="broken"') == 0
    assert server.end()[0] == 0
