from ferry.core.verb import Verb

VERB = Verb(
    name="pull",
    summary="Bring a model here: a hub id, a directory, a GGUF file or a built-in name; every byte checked by hash.",
    config="ferry.verbs.pull.config:PullConfig",
    plan="ferry.verbs.pull.plan:plan",
    run="ferry.verbs.pull.run:run",
    report="ferry.verbs.pull.report:report",
    order=10,
)
