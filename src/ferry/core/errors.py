"""Every error a user can cause, as one small tree.

    FerryError                exit 1   base: never raised itself
    ├── ConfigError           exit 2   a flag, key or value is wrong
    ├── InputError            exit 3   what was given cannot be read, or is not what it claims to be
    ├── LayoutError           exit 4   the layout asked for is impossible for this model
    ├── IntegrityError        exit 5   bytes differ from what was promised
    ├── OutputError           exit 6   the result cannot be written there
    ├── UnavailableError      exit 7   a network, package or program that is needed is not there
    └── GateError             exit 8   a condition set by the user does not hold

A message is one line: what was found, what was expected, where. `repair` says what to do next. `code` is stable and
listed in docs/reference/errors.md. Broken invariants of Ferry itself are plain `assert`s, not part of this tree.
"""


class FerryError(Exception):
    """A mistake that the user can mend."""

    exit_status = 1

    def __init__(self, message: str, *, code: str, repair: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.repair = repair

    def __reduce__(self) -> tuple[object, ...]:
        """Let it cross between processes."""
        return (_remade, (type(self), self.message, self.code, self.repair))

    def __str__(self) -> str:
        return f"{self.message}; {self.repair}" if self.repair else self.message


def _remade(kind: type[FerryError], message: str, code: str, repair: str) -> FerryError:
    return kind(message, code=code, repair=repair)


class ConfigError(FerryError):
    exit_status = 2


class InputError(FerryError):
    exit_status = 3


class LayoutError(FerryError):
    exit_status = 4


class IntegrityError(FerryError):
    exit_status = 5


class OutputError(FerryError):
    exit_status = 6


class UnavailableError(FerryError):
    exit_status = 7


class GateError(FerryError):
    exit_status = 8


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
