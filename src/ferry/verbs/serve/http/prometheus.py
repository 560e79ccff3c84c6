"""Counters and histograms in the text format of Prometheus, version 0.0.4. As much of it as this server needs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """Numbers that only grow, one for each combination of labels."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help = name, help
        self._labels = tuple(labels)
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, amount: float = 1) -> None:
        """Count something; `labels` are values in the order of their names."""
        assert len(labels) == len(self._labels)
        self._values[labels] = self._values.get(labels, 0.0) + amount

    @property
    def total(self) -> float:
        """The sum over all labels."""
        return sum(self._values.values())

    def lines(self) -> Iterator[str]:
        """Return the lines of all values."""
        for labels, value in sorted(self._values.items()):
            yield sample(self.name, dict(zip(self._labels, labels, strict=True)), value)


class Histogram:
    """How often a number was below each of some bounds."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name, self.help = name, help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self) -> Iterator[str]:
        """Return the lines of all bounds, the sum and the count."""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            yield sample(f"{self.name}_bucket", {"le": "+Inf" if bound == float("inf") else f"{bound:g}"}, total)
        yield sample(f"{self.name}_sum", {}, self._sum)
        yield sample(f"{self.name}_count", {}, total)


class Gauge:
    """A number of this moment."""

    def __init__(self, name: str, help: str, value: float, kind: str = "gauge") -> None:
        self.name, self.help, self.kind = name, help, kind
        self._value = value

    def lines(self) -> Iterator[str]:
        """Return its line."""
        yield sample(self.name, {}, self._value)


def text_of(metrics: Sequence[Counter | Histogram | Gauge]) -> str:
    """Return the page that Prometheus reads."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """Return one line."""
    written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{written}}} {value:.17g}" if written else f"{name} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
