"""`ferry convert`: what it is called and where its parts are."""

from ferry.core.verb import Verb

VERB = Verb(
    name="convert",
    summary="Move a model between layouts: Hugging Face, Megatron shards, GGUF; streaming, bit-exact.",
    config="ferry.verbs.convert.config:ConvertConfig",
    plan="ferry.verbs.convert.plan:plan",
    run="ferry.verbs.convert.run:run",
    report="ferry.verbs.convert.report:report",
    order=20,
)
