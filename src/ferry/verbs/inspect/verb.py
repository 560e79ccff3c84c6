"""`ferry inspect`: what it is called and where its parts are."""

from ferry.core.verb import Verb

VERB = Verb(
    name="inspect",
    summary="Show what a model directory, shard set or GGUF file is, from headers alone.",
    config="ferry.verbs.inspect.config:InspectConfig",
    run="ferry.verbs.inspect.run:run",
    report="ferry.verbs.inspect.report:report",
    order=25,
)
