"""Ferry carries a Hugging Face language model to the hardware you have, and proves that nothing was lost on the way.

Every verb is a function here (`ferry.convert(...)`), a command (`ferry convert ...`) and a step of a voyage; all are
made from the same config model. Importing this module imports no verb: each is fetched when it is first named.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    from ferry.core.verb import discover, python_function

    verb = discover().get(name)
    if verb is None:
        raise AttributeError(f"module 'ferry' has no attribute {name!r}")
    return python_function(verb)


def __dir__() -> list[str]:
    from ferry.core.verb import discover

    return sorted(["__version__", *discover()])
