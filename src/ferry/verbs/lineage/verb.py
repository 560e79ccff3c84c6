"""`ferry lineage`: what it is called and where its parts are."""

from ferry.core.verb import Verb

VERB = Verb(
    name="lineage",
    summary="Print how an artifact came to be: the graph of its ancestors, from its manifest alone.",
    config="ferry.verbs.lineage.config:LineageConfig",
    run="ferry.verbs.lineage.run:run",
    report="ferry.verbs.lineage.report:report",
    order=32,
)
