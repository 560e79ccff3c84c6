"""`ferry recipes`: recommended layouts, what they need, and a proposal where there is none."""

from ferry.core.verb import Verb

VERB = Verb(
    name="recipes",
    summary="List and show recommended layouts for training, or propose one.",
    config="ferry.control.recipes.config:RecipesConfig",
    run="ferry.control.recipes.run:run",
    report="ferry.control.recipes.report:report",
    order=205,
)
