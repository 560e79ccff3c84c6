"""`ferry config`: the values a verb would run with, where each comes from, and the schema of its config file."""

from ferry.core.verb import Verb

VERB = Verb(
    name="config",
    summary="Show a verb's values and where each comes from, or the schema of its config.",
    config="ferry.control.config.config:ConfigConfig",
    run="ferry.control.config.run:run",
    report="ferry.control.config.report:report",
    order=220,
)
