from ferry.core.verb import Verb

VERB = Verb(
    name="quantize",
    summary="Make a model small: SmoothQuant W8A8 or AWQ W4A16, block by block, with proof of what it lost.",
    config="ferry.verbs.quantize.config:QuantizeConfig",
    plan="ferry.verbs.quantize.plan:plan",
    run="ferry.verbs.quantize.run:run",
    report="ferry.verbs.quantize.report:report",
    exit_status="ferry.verbs.quantize.report:exit_status",
    order=50,
)
