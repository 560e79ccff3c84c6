"""`ferry run`: what it is called and where its parts are."""

from ferry.core.verb import Verb

VERB = Verb(
    name="run",
    summary="Make a whole voyage: the steps of a YAML file, with gates, resumable, ending in one HTML report.",
    config="ferry.control.voyage.config:RunConfig",
    plan="ferry.control.voyage.plan:plan",
    run="ferry.control.voyage.run:run",
    report="ferry.control.voyage.report:report",
    order=5,
)
