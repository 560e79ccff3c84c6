from ferry.core.verb import Verb

VERB = Verb(
    name="serve",
    summary="Answer over the OpenAI API on any hardware; what a schema says is what comes out.",
    config="ferry.verbs.serve.config:ServeConfig",
    plan="ferry.verbs.serve.plan:plan",
    run="ferry.verbs.serve.run:run",
    report="ferry.verbs.serve.report:report",
    order=60,
)
