"""What is asked of an engine, and what comes back: token ids in, token ids out.

An engine knows nothing of text, chat or HTTP. Whoever asks makes tokens of text, cuts at stop texts, and checks what
came out. No torch here: the front end imports this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Finish = Literal["stop", "length", "cancelled", "error"]
"""`stop`: an end token or the end of the grammar; `length`: max_tokens or the longest context."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The names and their meaning are those of vLLM and the OpenAI API.

    Penalties work on logits in this order: logit_bias, repetition (prompt and answer), frequency and presence (answer),
    grammar mask, then temperature, min_p, top_k, top_p. Temperature 0 takes the likeliest token.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    """No end token before so many tokens."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """With a seed the same request gives the same answer, whatever else runs beside it."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer: the model's own (unless ignored) and the request's `stop_token_ids`."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """None: none; n: the chosen token's and those of the n likeliest. Before penalties and temperature, after vLLM."""
    prompt_logprobs: int | None = None
    """The same of every token of the prompt but the first. Such a prompt is not taken from the prefix cache."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to be made. `grammar` is Lark for llguidance, as `ferry.guided` writes it; "" = free."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    grammar: str = ""


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one place. `rank` of the token there is 1 for the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, in order: (id, logprob). As many as were asked for."""


@dataclass(frozen=True, slots=True)
class Output:
    """What is new of one request. The last one has a `finish`; an end token that was chosen is not in `token_ids`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids`, where asked for."""
    finish: Finish | None = None
    end_token_id: int | None = None
    """The end token that ended it, if one did."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With the first output, where asked for: one a token of the prompt, None for the first."""
    num_cached_tokens: int = 0
    """With the first output: tokens of the prompt that the prefix cache had."""
    error_code: str = ""
    """With finish `error`: a code of `FerryError`, as `guided.too_complex`, `engine.not-finite`, `engine.lost`."""
    error_message: str = ""


class Stats(NamedTuple):
    """Gauges and counters of an engine since it started."""

    num_running: int = 0
    num_waiting: int = 0
    kv_used: float = 0.0
    """Share of the cache's blocks that running requests hold, 0 to 1."""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
