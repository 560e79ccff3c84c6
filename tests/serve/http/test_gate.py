"""The queue counts answers, so a request of many does not count as one."""

from __future__ import annotations

import asyncio

import pytest

from ferry.verbs.serve.http.errors import ApiError
from ferry.verbs.serve.http.gate import Gate


def test_each_answer_of_a_request_waits_for_a_place() -> None:
    async def visit() -> None:
        gate, seconds = Gate(num_places=1, max_waiting=2), list[float]()
        async with gate.visit(3, seconds.append) as many:
            assert gate.num_waiting == 3
            async with many.place():
                assert (gate.num_waiting, len(seconds)) == (2, 1)
                with pytest.raises(ApiError, match="max_queue=2"):
                    gate.check()
            gate.check()
            async with many.place():
                gate.check()
        assert (gate.num_waiting, gate.num_inside, len(seconds)) == (0, 0, 1)

    asyncio.run(visit())
