"""`ferry train tokens`: the training data as Megatron reads them, `.bin` and `.idx`, for other trainers."""

from __future__ import annotations

from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory, check_target
from ferry.core.verb import Result
from ferry.data.megatron import export_megatron
from ferry.data.prepare import PreparedData
from ferry.verbs.train.config import TrainConfig

PREFIX = "data"


def write_tokens(config: TrainConfig, data: PreparedData, reporter: Reporter) -> Result:
    """Write `data_packed_{input_ids,attention_mask,labels}_document`, or `data_text_document` for pretraining."""
    assert config.output is not None
    check_target(config.output, overwrite=config.overwrite)
    kind = "text" if config.method == "pretrain" else "packed"
    with StagedDirectory(config.output, overwrite=config.overwrite) as staged:
        files = export_megatron(data.train, staged.work / PREFIX, "text" if kind == "text" else "packed")
        staged.commit()
    reporter.event("written", output=str(config.output), files=len(files))
    return {
        "action": "tokens",
        "output": str(config.output),
        "prefix": str(config.output / PREFIX),
        "files": sorted(path.name for path in files),
        "samples": data.train.num_samples,
        "tokens": int(data.train.lengths.sum()),
        "data_sha256": data.train.sha256,
        "artifact": None,
    }
