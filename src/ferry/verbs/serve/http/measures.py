"""What the server measures of itself; `/metrics` shows it together with what the engine says."""

from __future__ import annotations

import time
from collections.abc import Callable

from ferry.engines.engine import Condition
from ferry.engines.request import Stats
from ferry.verbs.serve.http.gate import Gate
from ferry.verbs.serve.http.prometheus import Counter, Gauge, Histogram, text_of

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Measures:
    """Everything that is counted, from the start of the server on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first_token = _seconds("ferry_time_to_first_token_seconds", "From a request's coming to its first token.")
        self.between_tokens = _seconds("ferry_inter_token_seconds", "Between two tokens of one answer.")
        self.whole = _seconds("ferry_request_seconds", "From a request's coming to the end of its answer.")
        self.queue = _seconds("ferry_queue_seconds", "From a request's coming to its first place in the engine.")
        self.compiling = _seconds("ferry_guided_compile_seconds", "Compiling the grammar of a constraint.")
        self.requests = Counter("ferry_requests_total", "Requests by route and status.", ("route", "status"))
        self.answers = Counter("ferry_answers_total", "Answers by how they ended.", ("finish",))
        self.cut = Counter("ferry_answers_cut_total", "Answers that did not come to their end, by reason.", ("reason",))
        self.rejections = Counter("ferry_rejections_total", "Requests that were not let in, by reason.", ("reason",))
        self.guided = Counter("ferry_guided_answers_total", "Answers under a constraint, by verdict.", ("verdict",))
        self.prompt_tokens = Counter("ferry_prompt_tokens_total", "Tokens of prompts.")
        self.cached_tokens = Counter("ferry_prompt_tokens_cached_total", "Tokens of prompts out of the prefix cache.")
        self.generated_tokens = Counter("ferry_generation_tokens_total", "Tokens of answers.")

    def page(self, gate: Gate, stats: Stats | None, condition: Condition) -> str:
        """Return the page of `/metrics`; `stats` is nothing while no engine answers."""
        return text_of([*_counted(self), *_of_gate(gate), *_of_engine(stats, condition)])

    def totals(self) -> dict[str, int]:
        """Return the sums that a server gives at its end."""
        return {
            "answers": int(self.answers.total),
            "guided_answers": int(self.guided.total),
            "rejections": int(self.rejections.total),
            "prompt_tokens": int(self.prompt_tokens.total),
            "generated_tokens": int(self.generated_tokens.total),
        }


def _counted(measures: Measures) -> list[Counter | Histogram]:
    """Return what is counted, in the order above."""
    return [value for value in vars(measures).values() if isinstance(value, Counter | Histogram)]


def _seconds(name: str, help: str) -> Histogram:
    return Histogram(name, help, _SECONDS)


def _of_gate(gate: Gate) -> list[Gauge]:
    return [
        Gauge("ferry_requests_waiting", "Answers without a place in the engine.", gate.num_waiting),
        Gauge("ferry_requests_inside", "Requests that wait or run.", gate.num_inside),
    ]


def _of_engine(stats: Stats | None, condition: Condition) -> list[Gauge]:
    state = [
        Gauge("ferry_engine_ready", "1 while the engine takes requests.", float(condition.state == "ready")),
        Gauge("ferry_engine_restarts_total", "Times the engine was started again.", condition.num_restarts, "counter"),
    ]
    if stats is None:
        return state
    return [
        *state,
        Gauge("ferry_engine_running", "Answers the engine works at.", stats.num_running),
        Gauge("ferry_engine_waiting", "Answers that wait inside the engine.", stats.num_waiting),
        Gauge("ferry_kv_cache_used_ratio", "Share of the cache that running answers hold.", stats.kv_used),
        *(
            Gauge(f"ferry_engine_{name}_total", help, value, "counter")
            for name, help, value in (
                ("prompt_tokens", "Tokens of prompts the engine took.", stats.num_prompt_tokens),
                ("generated_tokens", "Tokens the engine made.", stats.num_generated_tokens),
                ("prefix_queries", "Tokens looked for in the prefix cache.", stats.num_prefix_queried_tokens),
                ("prefix_hits", "Tokens found in the prefix cache.", stats.num_prefix_hit_tokens),
                ("preemptions", "Answers put aside for lack of memory.", stats.num_preemptions),
                ("steps", "Steps of the engine.", stats.num_steps),
            )
        ),
    ]
