"""A model in this process, asked from Python: `LLM(model).generate(prompts, sampling_params)`, as in vLLM.

    from ferry import LLM, SamplingParams
    llm = LLM(model="path/to/model")
    print(llm.generate("The sea is", SamplingParams(temperature=0))[0].outputs[0].text)

The engine is the one that `ferry serve` runs. Guided answers are checked when they are finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferry.core.errors import ConfigError, FerryError, InputError, IntegrityError, UnavailableError, did_you_mean
from ferry.engines.answers import Answer, CompletionOutput, RequestOutput
from ferry.engines.engine import EngineInfo, EngineSettings
from ferry.engines.model_facts import SCHEMES, ModelFacts, read_facts
from ferry.engines.parameters import SamplingParams, defaults_of
from ferry.engines.preflight import check_model
from ferry.engines.request import Request
from ferry.engines.text import open_text
from ferry.guided.compiling import Compiled, Compiler, tokenizer_of
from ferry.guided.request import Constraint
from ferry.guided.validate import check

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ferry.engines.native.loop import NativeEngine

ROUND_TO = "w8a8"
NAMES = {"enable_prefix_caching": "prefix_caching"}
"""vLLM's names of settings that have another one here."""
OPTIONS = (
    "dtype", "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes", "block_size", "max_num_seqs",
    "max_num_batched_tokens", "prefix_caching", "threads", "trust_remote_code", "seed",
)  # fmt: skip

Prompt = str | Mapping[str, Any]
"""A text, {"prompt": text}, or {"prompt_token_ids": [...]}."""


@dataclass
class _Asked:
    """A prompt that is being answered."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    constraint: Constraint | None
    compiling: Future[Compiled] | None = None
    answers: list[Answer] = field(default_factory=list)


class LLM:
    """A model on this machine's CPU. Close it, or use it in a `with` statement, to give its memory back.

    `model` is a directory. `quantization="w8a8"` rounds a float model to 8 bits while it is loaded; other words are
    compared with what the model is. Further names are those of vLLM: dtype, max_model_len, gpu_memory_utilization,
    kv_cache_memory_bytes, block_size, max_num_seqs, max_num_batched_tokens, enable_prefix_caching, seed,
    trust_remote_code, and `threads`.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        from ferry.engines.native.loop import NativeEngine

        given = {NAMES.get(name, name): value for name, value in options.items()}
        _refuse_unknown(given)
        if tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={tensor_parallel_size}: a model in this process has one device",
                code="offline.ranks",
                repair="leave it out, or use `ferry serve --engine vllm` where there are more",
            )
        facts = read_facts(Path(model))
        settings = EngineSettings(
            Path(model),
            quantization=_quantization(quantization, facts),
            **{name: value for name, value in given.items() if value is not None},
        )
        check_model(facts, settings)
        self._text = open_text(settings.model, settings.trust_remote_code)
        self._running: NativeEngine | None = NativeEngine(settings)
        self._info = self._running.info
        self._compiler: Compiler | None = None
        self._num_asked = 0

    @property
    def info(self) -> EngineInfo:
        """What the engine is, and what was chosen for it and why."""
        return self._info

    @property
    def _engine(self) -> NativeEngine:
        if self._running is None:
            raise UnavailableError("this LLM was closed", code="offline.closed", repair="open the model again")
        return self._running

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and give its memory back."""
        if self._running is not None:
            self._running.close()
            self._running = None
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None

    def get_default_sampling_params(self) -> SamplingParams:
        """Return how the model itself wants to be sampled, after its generation_config.json."""
        return defaults_of(self._text.default_sampling)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Return the answers to prompts, in their order. Without parameters the model's own are used."""
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._answer([self._read(prompt) for prompt in several], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Return the model's next message in one conversation or in several."""
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        if isinstance(messages, str) or any(isinstance(each, str) for each in messages):
            raise InputError(
                "messages are text, expected a list of messages",
                code="offline.messages",
                repair='give [{"role": "user", "content": "..."}], or use generate() for plain text',
            )
        several: Any = [messages] if is_one else messages
        read: list[tuple[str | None, list[int]]] = []
        for conversation in several:
            text = self._text.render_chat(
                conversation, tools, add_generation_prompt=add_generation_prompt, further=chat_template_kwargs
            )
            read.append((text, self._text.encode(text, add_special_tokens=False)))
        return self._answer(read, sampling_params, use_tqdm)

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return a prompt as text, where it is one, and tokens."""
        if isinstance(prompt, str):
            return prompt, self._text.encode(prompt)
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return prompt.get("prompt"), [int(token) for token in prompt["prompt_token_ids"]]
        if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
            return prompt["prompt"], self._text.encode(prompt["prompt"])
        raise InputError(
            f"a prompt is {type(prompt).__name__}, expected a text",
            code="offline.prompt",
            repair='give texts, or {"prompt_token_ids": [...]} for tokens',
        )

    def _answer(
        self,
        read: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = [sampling_params] * len(read) if isinstance(sampling_params, SamplingParams) else list(sampling_params)
        if len(params) != len(read):
            raise InputError(f"{len(read)} prompts have {len(params)} sampling_params", code="offline.prompt")
        asked = [
            _Asked(prompt, token_ids, one, None if one.guided is None else one.guided.constraint())
            for (prompt, token_ids), one in zip(read, params, strict=True)
        ]
        self._compile(asked)
        first = self._num_asked
        self._num_asked += len(asked)
        with self._begun(asked, first) as running, _bar(len(running), use_tqdm) as bar:
            while running:
                for output in self._engine.step():
                    answer, number = running[output.request_id]
                    if output.finish == "error":
                        raise UnavailableError(
                            f"{_which(asked, number)}: {output.error_message}", code=output.error_code
                        )
                    is_stopped = answer.add(output)
                    if is_stopped and output.finish is None:
                        self._engine.cancel(output.request_id)
                    if answer.output.finished():
                        del running[output.request_id]
                        bar.update()
        return [self._finished(one, str(first + number)) for number, one in enumerate(asked)]

    def _compile(self, asked: Sequence[_Asked]) -> None:
        """Compile all constraints, so that what is refused is refused before a token is made."""
        for one in asked:
            if one.constraint is not None:
                if self._compiler is None:
                    source = self._text.vocabulary.source
                    num_tokens, ends = self.info.num_tokens, self._text.end_token_ids
                    self._compiler = Compiler(tokenizer_of(source, num_tokens, ends))
                one.compiling = self._compiler.submit(one.constraint)
        for number, one in enumerate(asked):
            if one.compiling is not None:
                with _named(asked, number):
                    one.compiling.result()

    @contextmanager
    def _begun(self, asked: Sequence[_Asked], first: int) -> Iterator[dict[str, tuple[Answer, int]]]:
        """Give all requests to the engine; take back at the end what still runs, as after an error."""
        running: dict[str, tuple[Answer, int]] = {}
        try:
            for number, one in enumerate(asked):
                grammar = one.compiling.result().lark if one.compiling is not None else ""
                for index in range(one.params.n):
                    sampling = one.params.sampling(
                        end_token_ids=self._text.end_token_ids,
                        room=max(1, self.info.max_model_len - len(one.token_ids)),
                        num_tokens=self.info.num_tokens,
                        index=index,
                    )
                    request = Request(f"{first + number}.{index}", tuple(one.token_ids), sampling, grammar)
                    with _named(asked, number):
                        self._engine.add(request)
                    one.answers.append(Answer(self._text, one.params, index))
                    running[request.id] = (one.answers[-1], number)
            yield running
        finally:
            for request_id in running:
                self._engine.cancel(request_id)

    def _finished(self, asked: _Asked, request_id: str) -> RequestOutput:
        """Return a prompt with its answers, the guided ones checked."""
        outputs = [answer.output for answer in asked.answers]
        if asked.compiling is not None:
            for output in outputs:
                _check(asked.compiling.result(), output)
        first = asked.answers[0]
        return RequestOutput(
            request_id, asked.prompt, asked.token_ids, outputs, first.prompt_logprobs, first.num_cached_tokens
        )


def _check(compiled: Compiled, output: CompletionOutput) -> None:
    """Say whether a guided answer keeps its promise. One that ended by itself must."""
    output.guided = check(compiled, output.text, cut=output.finish_reason == "length")
    is_cut = output.finish_reason == "length" or isinstance(output.stop_reason, str)
    if not output.guided.valid and not is_cut:
        raise IntegrityError(
            f"a guided answer is not what was promised: {output.guided.reason}: {output.text[:200]!r}",
            code="guided.broken",
            repair="this is a defect of Ferry: please report the constraint and the model",
        )


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            known = ["model", "quantization", "tensor_parallel_size", *NAMES, *OPTIONS]
            raise ConfigError(
                f"LLM has no option {name}{did_you_mean(name, known)}",
                code="offline.option",
                repair=f"known: {', '.join(known)}",
            )


def _quantization(wanted: str | None, facts: ModelFacts) -> str:
    """Return what is done while loading; refuse a word that is not what the model is."""
    if wanted is None or facts.is_called(wanted):
        return ""
    if wanted not in SCHEMES:
        known = list(SCHEMES)
        raise ConfigError(
            f"quantization={wanted!r} is unknown{did_you_mean(wanted, known)}",
            code="offline.quantization",
            repair=f"leave it out, or use {', '.join(known)}",
        )
    if not facts.format and wanted == ROUND_TO:
        return ROUND_TO
    raise ConfigError(
        f"quantization={wanted!r}: {facts.path} is {facts.described}",
        code="offline.quantization",
        repair="leave it out for what the model is; `ferry quantize` makes quantized models",
    )


@contextmanager
def _named(asked: Sequence[_Asked], number: int) -> Iterator[None]:
    """Say of which prompt an error is, where there are several."""
    try:
        yield
    except FerryError as error:
        if len(asked) > 1:
            error.message = f"{_which(asked, number)}: {error.message}"
        raise


def _which(asked: Sequence[_Asked], number: int) -> str:
    return f"prompt {number} of {len(asked)}"


@contextmanager
def _bar(total: int, is_wanted: bool) -> Iterator[Any]:
    """Draw progress, where somebody watches."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="Answers", unit="answer", disable=None if is_wanted else True) as bar:
        yield bar
