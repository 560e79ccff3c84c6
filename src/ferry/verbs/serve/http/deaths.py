"""Tells the operator of every death of the engine, and of its coming back. An engine says only what it is doing now."""

from __future__ import annotations

import asyncio

from ferry.verbs.serve.http.served import Served

LOOK_S = 0.2


async def tell_deaths(served: Served) -> None:
    """Look at the engine until cancelled; a restart that was over between two looks is told too."""
    num_told, died_s = 0, 0.0
    is_back = True
    while True:
        condition, now_s = served.engine.condition, served.measures.clock()
        if condition.num_restarts > num_told:
            num_told, died_s, is_back = condition.num_restarts, now_s, False
            served.note("engine died", {"reason": condition.last_death, "restart": num_told})
        if not is_back and condition.state == "ready":
            is_back = True
            served.note("engine ready again", {"restart": num_told, "seconds": round(now_s - died_s, 2)})
        await asyncio.sleep(LOOK_S)
