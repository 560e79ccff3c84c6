"""A step with everything known: references followed, config resolved, planned, and its identity taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ferry.control.voyage.fields import field_layer
from ferry.control.voyage.identity import inputs_of_paths, inputs_of_words, step_identity
from ferry.control.voyage.references import find, references_in, step_of, substitute
from ferry.control.voyage.state import State
from ferry.control.voyage.voyage import Step, Voyage
from ferry.core.config import VerbConfig, resolve
from ferry.core.errors import ConfigError, FerryError, OutputError
from ferry.core.plan import Plan
from ferry.core.verb import discover, load_config, load_plan


@dataclass(frozen=True)
class Prepared:
    """A step that could run now. `told` is its resolved config, or its words, as JSON values."""

    step: Step
    told: dict[str, Any]
    identity: str
    config: VerbConfig | None = None
    origins: dict[str, str] | None = None
    plan: Plan | None = None


def prepare(voyage: Voyage, step: Step, names: dict[str, Any], state: State, *, again: bool = False) -> Prepared:
    """Return a step ready to run. Writes nothing; an error names the step. `again` replaces what it made before."""
    missing = [name for name in steps_needed(step) if name not in names["steps"]]
    if missing:
        text = f"step {step.name!r} needs the result of step {missing[0]!r}, which is not finished"
        raise ConfigError(text, code="run.not-finished", repair="make that one first")
    try:
        if not step.verb:
            return _prepare_command(voyage, step, names)
        prepared = _prepare_verb(voyage, step, names, state)
    except FerryError as error:
        raise at_step(error, step) from error
    return _replacing(prepared, state) if again else prepared


def _replacing(prepared: Prepared, state: State) -> Prepared:
    """Return the step so that it replaces what this voyage made, where the verb can do that."""
    config, plan = prepared.config, prepared.plan
    if config is None or plan is None or not plan.output or "overwrite" not in type(config).model_fields:
        return prepared
    if not state.is_ours(Path(plan.output)):
        return prepared
    return replace(prepared, config=config.model_copy(update={"overwrite": True}))


def steps_needed(step: Step) -> list[str]:
    """Return the steps whose results a step refers to."""
    references = references_in([step.fields, list(step.command), step.env])
    return [name for name in dict.fromkeys(map(step_of, references)) if name]


def at_step(error: FerryError, step: Step) -> FerryError:
    """Return the same error, naming the step it happened in."""
    return type(error)(f"step {step.name!r}: {error.message}", code=error.code, repair=error.repair)


def _prepare_verb(voyage: Voyage, step: Step, names: dict[str, Any], state: State) -> Prepared:
    verb = discover()[step.verb]
    origin = f"{voyage.file.name}, line {step.line}"
    fields = {key: substitute(value, partial(find, names)) for key, value in step.fields.items()}
    resolved = resolve(load_config(verb), [field_layer(verb, fields, origin)])
    config, plan = resolved.config, None
    if verb.plan:
        config, plan = _plan(config, step, state)
    told = config.model_dump(mode="json", exclude={"overwrite"})
    inputs = dict(plan.inputs) if plan else inputs_of_paths(v for _, v in config if isinstance(v, Path))
    return Prepared(step, told, step_identity(voyage, step.verb, told, inputs), config, resolved.origins, plan)


def _plan(config: VerbConfig, step: Step, state: State) -> tuple[VerbConfig, Plan]:
    """Plan a verb; where its target exists, plan to replace it if this voyage made it, else refuse."""
    make_plan = load_plan(discover()[step.verb])
    try:
        return config, make_plan(config)
    except OutputError as error:
        if error.code != "output.exists" or "overwrite" not in type(config).model_fields:
            raise
        replacing = config.model_copy(update={"overwrite": True})
        plan = make_plan(replacing)
        if not state.is_ours(Path(plan.output)):
            raise OutputError(
                f"{plan.output} exists and was not made by this voyage, or was changed since",
                code="run.foreign-target",
                repair="remove it, or choose another target",
            ) from None
        return replacing, plan


def _prepare_command(voyage: Voyage, step: Step, names: dict[str, Any]) -> Prepared:
    words = [substitute(word, partial(find, names)) for word in step.command]
    for word in words:
        if isinstance(word, list | dict):
            raise ConfigError(f"the word {word!r} is not one value", code="run.command-word")
    env = {key: str(substitute(value, partial(find, names))) for key, value in step.env.items()}
    told: dict[str, Any] = {"command": [str(word) for word in words], "env": env}
    inputs = inputs_of_words(told["command"], voyage.file.parent)
    return Prepared(step, told, step_identity(voyage, "command", told, inputs))
