"""The meeting of several nodes: one small process beside each supervisor talks to the store of node 0.

The store server and every network call live here, because a supervisor forks and must therefore have no threads, and
watches and must therefore never wait for a network. The two talk through a channel:

    to the supervisor    {"generation": N, "run": text}, {"done": N}, {"stop": true}, {"failed": {...}}, {"lost": text}
    from the supervisor  {"raise": N}, {"finished": N}, {"stop": true}, {"failed": {...}}, {"leave": true}

A generation is raised, never set: many nodes may see the same failure, and together they start one new generation.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from ferry.core.record import describe_error
from ferry.verbs.train.crew.channel import Channel, wait_for_any
from ferry.verbs.train.crew.kinship import die_with_parent
from ferry.verbs.train.crew.spec import CrewSpec
from ferry.verbs.train.crew.stores import tcp_store

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_S = 0.1
_ALIVE_S = 1.0
_FAREWELL_S = 10.0


def meet(spec: CrewSpec, end: socket.socket, supervisor: int) -> NoReturn:
    """Keep the connection of this node until the supervisor takes leave; then end the process."""
    try:
        die_with_parent(signal.SIGKILL, supervisor)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel = Channel(end)
        try:
            _Meeting(spec, channel).hold()
        except (RuntimeError, OSError) as error:  # what torch's store raises when the other side is silent or gone
            where = f"{spec.cluster.address}:{spec.cluster.port}"
            channel.send({"lost": f"node {spec.cluster.node_rank} lost the store of node 0 at {where}: {_line(error)}"})
        channel.flush(_FAREWELL_S)
    finally:
        os._exit(0)


class _Meeting:
    def __init__(self, spec: CrewSpec, channel: Channel) -> None:
        self.spec = spec
        self.cluster = spec.cluster
        self.channel = channel
        self.generation = -1
        self.told: set[str] = set()
        self.heard = dict.fromkeys(range(self.cluster.num_nodes), (0, time.monotonic()))
        self.beats_s = 0.0

    def hold(self) -> None:
        store = self._join()
        while True:
            wait_for_any([self.channel], _POLL_S)
            for message in self.channel.receive():
                if "leave" in message:
                    return self._leave(store)
                self._pass_on(store, message)
            if self.channel.is_closed:
                return None
            self._look(store)
            self._listen_for_others(store)

    def _join(self) -> Store:
        """Enter the store and return when all nodes have."""
        is_host = self.cluster.node_rank == 0
        store = tcp_store(self.cluster, is_host=is_host, timeout_s=self.spec.join_limit_s)
        if is_host:
            store.set("run", secrets.token_hex(4))
            store.set("num_workers", str(self.spec.num_workers))
            store.compare_set("generation", "", "0")
        if store.add(f"joined/{self.cluster.node_rank}", 1) > 1:
            # This node was here before and was started anew: what the others still run waits for the old one.
            _raise(store, int(store.get("generation")) + 1)
        store.wait([f"joined/{node}" for node in range(self.cluster.num_nodes)])
        store.set_timeout(timedelta(seconds=self.spec.contact_limit_s))
        expected = int(store.get("num_workers"))
        if expected != self.spec.num_workers:
            found = f"node {self.cluster.node_rank} has {self.spec.num_workers} workers, node 0 has {expected}"
            store.set("failed", json.dumps({"code": "train.cluster", "message": found, "exit_status": 2}))
        return store

    def _pass_on(self, store: Store, message: dict[str, Any]) -> None:
        if "raise" in message:
            _raise(store, message["raise"])
        if "finished" in message:
            store.add(f"finished/{message['finished']}", 1)
        if "stop" in message:
            store.set("stop", "1")
        if "failed" in message:
            store.compare_set("failed", "", json.dumps(message["failed"]))

    def _look(self, store: Store) -> None:
        """Tell the supervisor what is new."""
        generation = int(store.get("generation"))
        if generation != self.generation:
            self.generation = generation
            self.channel.send({"generation": generation, "run": store.get("run").decode()})
        self._tell_once("stop", store, lambda value: {"stop": True})
        self._tell_once("failed", store, lambda value: {"failed": json.loads(value)})
        if store.add(f"finished/{generation}", 0) == self.cluster.num_nodes:
            self._say_once(f"finished/{generation}", {"done": generation})

    def _tell_once(self, key: str, store: Store, message: Any) -> None:
        if key not in self.told and store.check([key]):
            self._say_once(key, message(store.get(key)))

    def _say_once(self, key: str, message: dict[str, Any]) -> None:
        if key not in self.told:
            self.told.add(key)
            self.channel.send(message)

    def _listen_for_others(self, store: Store) -> None:
        now_s = time.monotonic()
        if now_s - self.beats_s < _ALIVE_S:
            return
        self.beats_s = now_s
        store.add(f"alive/{self.cluster.node_rank}", 1)
        for node, (count, since_s) in self.heard.items():
            new = store.add(f"alive/{node}", 0)
            if new != count:
                self.heard[node] = (new, now_s)
            elif now_s - since_s > self.spec.contact_limit_s and not store.check([f"left/{node}"]):
                self._say_once("lost", {"lost": f"node {node} has not been heard for {now_s - since_s:.0f} s"})

    def _leave(self, store: Store) -> None:
        """Go; node 0 stays until the others have gone, because the store goes with it. It waits for no lost node."""
        store.set(f"left/{self.cluster.node_rank}", "1")
        if self.cluster.node_rank == 0:
            now_s = time.monotonic()
            limit_s = self.spec.contact_limit_s
            others = [f"left/{node}" for node, (_, since_s) in self.heard.items() if now_s - since_s <= limit_s]
            while not store.check(others) and time.monotonic() < now_s + _FAREWELL_S:
                time.sleep(_POLL_S)


def _raise(store: Store, generation: int) -> None:
    """Make the generation at least this one."""
    current = int(store.get("generation"))
    while current < generation:
        current = int(store.compare_set("generation", str(current), str(generation)))


def _line(error: BaseException) -> str:
    return " ".join(describe_error(error)["message"].split())[:300]
