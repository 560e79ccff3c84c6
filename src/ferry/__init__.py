"""Ferry carries a Hugging Face language model to the hardware you have, and proves that nothing was lost on the way.

Every verb is a function here (`ferry.convert(...)`), a command (`ferry convert ...`) and a step of a voyage; all are
made from the same config model. `ferry.LLM` asks a model from Python. Importing this module imports no verb: each name
is fetched when it is first used.
"""

__version__ = "0.1.0"

_PLACES = {
    "LLM": "ferry.engines.offline",
    "SamplingParams": "ferry.engines.parameters",
    "GuidedDecodingParams": "ferry.engines.parameters",
    "StructuredOutputsParams": "ferry.engines.parameters",
    "RequestOutput": "ferry.engines.answers",
    "CompletionOutput": "ferry.engines.answers",
}


def __getattr__(name: str) -> object:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    from ferry.core.verb import discover, python_function

    verb = discover().get(name)
    if verb is None:
        raise AttributeError(f"module 'ferry' has no attribute {name!r}")
    return python_function(verb)


def __dir__() -> list[str]:
    from ferry.core.verb import discover

    return sorted(["__version__", *_PLACES, *discover()])
