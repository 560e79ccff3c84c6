"""`ferry chat`: what it is called and where its parts are."""

from ferry.core.verb import Verb

VERB = Verb(
    name="chat",
    summary="Talk to a model in the terminal, or ask it one thing; answers can follow a JSON schema.",
    config="ferry.verbs.chat.config:ChatConfig",
    run="ferry.verbs.chat.run:run",
    report="ferry.verbs.chat.report:report",
    exit_status="ferry.verbs.chat.report:exit_status",
    order=62,
)
