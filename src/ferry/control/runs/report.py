"""Run records as a screen for people."""

from __future__ import annotations

import json
import time
from typing import Any

from ferry.core.units import duration_text, size_text
from ferry.core.verb import Result

NUM_EVENTS_SHOWN = 30


def report(result: Result) -> str:
    """Return the page for what was asked."""
    pages = {"list": _list, "show": _show, "compare": _compare}
    return pages[result["action"]](result)


def _list(result: Result) -> str:
    if not result["runs"]:
        return "no runs"
    width = max(len(run["id"]) for run in result["runs"])
    return "\n".join(_line(run, width) for run in result["runs"])


def _line(run: dict[str, Any], width: int) -> str:
    wall = "" if run["wall_s"] is None else duration_text(run["wall_s"])
    what = run["error"] or run["artifact"] or ""
    return f"{run['id']:{width}}  {run['status']:11}  {wall:>12}  {what}".rstrip()


def _show(run: Result) -> str:
    lines = [f"{run['id']}  {run['status']}", f"  record     {run['path']}", f"  directory  {run['directory']}"]
    if run["wall_s"] is not None:
        cpu = f"{run['user_cpu_s']:.2f} s user, {run['system_cpu_s']:.2f} s system"
        lines.append(f"  took       {duration_text(run['wall_s'])}; CPU {cpu}; peak {size_text(run['peak_rss_bytes'])}")
    conditions = run["environment"]
    if conditions:
        machine = f"{conditions['cpu']}, {conditions['num_cores']} cores, {size_text(conditions['memory_bytes'])}"
        lines.append(f"  machine    {machine}")
        lines.append(f"  software   ferry {conditions['ferry']}, python {conditions['python']}")
    lines += ["", "  config"]
    for name, value in run["config"].items():
        lines.append(f"    {name} = {_text(value)}  ({run['origins'].get(name, 'several')})")
    events = run["events"]
    if events:
        lines += ["", f"  events (last {min(len(events), NUM_EVENTS_SHOWN)} of {len(events)})"]
        lines += [f"    {_event(event)}" for event in events[-NUM_EVENTS_SHOWN:]]
    for name in ("result", "failure"):
        if run[name]:
            lines += ["", f"  {name}", *(f"    {key} = {_text(value)}" for key, value in _whole(run[name]).items())]
    lines += ["", f"page  {run['page']}"] if "page" in run else []
    return "\n".join(lines)


def _compare(result: Result) -> str:
    first, second = result["runs"]
    lines = [f"A  {first['id']}  {first['status']}", f"B  {second['id']}  {second['status']}"]
    for part, rows in result["differences"].items():
        if rows:
            lines += ["", part, *(f"  {name}: {_text(left)} -> {_text(right)}" for name, left, right in rows)]
    if not any(result["differences"].values()):
        lines += ["", "nothing differs"]
    lines += _curves(result["curves"]) if "curves" in result else []
    lines += ["", f"page  {result['page']}"] if "page" in result else []
    return "\n".join(lines)


def _curves(curves: dict[str, Any]) -> list[str]:
    lines = ["", "curves"]
    for name in ("steps", "first_loss", "last_loss", "min_loss", "median_tokens_per_s"):
        left, right = ("none" if value is None else f"{value:.7g}" for value in curves[name])
        lines.append(f"  {name}: {left} -> {right}")
    num_steps, num_not_compared = curves["num_common_steps"], curves["num_not_compared"]
    if num_not_compared:
        lines.append(f"  not a number in one or both: {num_not_compared} of {num_steps} common steps")
    difference, num_compared = curves["max_loss_difference"], num_steps - num_not_compared
    if difference is None:
        return [*lines, "  there is no step to compare"]
    if difference == 0:
        return [*lines, f"  the losses of {num_compared} steps are equal, bit for bit"]
    where = f"at step {curves['max_loss_difference_step']}, of {num_compared} compared"
    return [*lines, f"  largest loss difference: {difference:.3g} {where}"]


def _whole(failure: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in failure.items() if key != "traceback"}


def _event(event: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["ts"]))
    fields = " ".join(f"{key}={_text(value)}" for key, value in event.items() if key not in ("ts", "event"))
    return f"{clock}  {event['event']}  {fields}".rstrip()


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
