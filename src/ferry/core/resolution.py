"""From the words after a verb to its complete config: all layers read and merged in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ferry.core.arguments import Arguments, read_arguments
from ferry.core.config import Resolved, VerbConfig, resolve
from ferry.core.options import options_of
from ferry.core.sources import environment_layer, file_layer, set_layer
from ferry.core.verb import Verb, discover, load_config


class Command(NamedTuple):
    """A command line, understood."""

    verb: Verb
    resolved: Resolved[VerbConfig]
    arguments: Arguments


def understand(verb: Verb, words: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Resolve a verb's config from files, environment and the words after the verb; raise one ConfigError for all."""
    config_class = load_config(verb)
    options = options_of(config_class, verb.name)
    arguments = read_arguments(words, options, config_class.passthrough())
    others = [name for name in discover() if name != verb.name]
    layers = [
        *(file_layer(Path(file), verb.name, options, others) for file in arguments.files),
        environment_layer(verb.name, options, environ),
        set_layer(arguments.assignments, options),
        arguments.layer,
    ]
    return Command(verb, resolve(config_class, layers), arguments)
