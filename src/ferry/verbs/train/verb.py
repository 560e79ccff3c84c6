from ferry.core.verb import Verb

VERB = Verb(
    name="train",
    summary="Pretrain or fine-tune a model on any layout, with exact resume; merge LoRA adapters.",
    config="ferry.verbs.train.config:TrainConfig",
    plan="ferry.verbs.train.plan:plan",
    run="ferry.verbs.train.run:run",
    report="ferry.verbs.train.report:report",
    exit_status="ferry.verbs.train.report:exit_status",
    order=40,
)
