"""`ferry verify`: what it is called and where its parts are."""

from ferry.core.verb import Verb

VERB = Verb(
    name="verify",
    summary="Check every byte of an artifact against its manifest, or two models against each other.",
    config="ferry.verbs.verify.config:VerifyConfig",
    plan="ferry.verbs.verify.plan:plan",
    run="ferry.verbs.verify.run:run",
    report="ferry.verbs.verify.report:report",
    order=30,
)
