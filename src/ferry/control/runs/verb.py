"""`ferry runs`: what was run, how it ended, and what differs between two runs."""

from ferry.core.verb import Verb

VERB = Verb(
    name="runs",
    summary="List, show and compare the records of runs.",
    config="ferry.control.runs.config:RunsConfig",
    run="ferry.control.runs.run:run",
    report="ferry.control.runs.report:report",
    order=210,
)
