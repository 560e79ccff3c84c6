"""What a conversion would do: everything is decided, checked and refused here, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ferry.core.carry import WINDOW_BYTES, Spec, Transform
from ferry.core.dtypes import num_bytes
from ferry.core.errors import ConfigError, LayoutError
from ferry.core.family import HEAD, Model
from ferry.core.layout import padded_vocabulary
from ferry.core.plan import Plan, PlannedFile
from ferry.core.staging import check_apart, check_target
from ferry.families.registry import check_name
from ferry.formats.checkpoint import Assets, Checkpoint, Draft
from ferry.formats.fingerprint import content_id, file_sha256, manifest_of
from ferry.formats.hf import INDEX, find_assets, missing_assets
from ferry.formats.hf_write import draft_hf
from ferry.formats.megatron_args import scaling_note
from ferry.formats.megatron_names import MegatronLayout
from ferry.formats.megatron_optimizer import OptimizerState, read_optimizer
from ferry.formats.megatron_write import draft_megatron
from ferry.formats.opening import open_checkpoint
from ferry.formats.torch_dist_write import draft_torch_dist
from ferry.verbs.convert.config import ConvertConfig
from ferry.verbs.convert.from_gguf import is_gguf, plan_gguf
from ferry.verbs.convert.normhead import normalise_rows
from ferry.verbs.convert.paths import source_and_target
from ferry.verbs.convert.unused import layout_options, refuse_layout

INTERPRETER_BYTES = 60_000_000
DEFAULT_VOCAB_MULTIPLE = 128
HF_WORDS = ("hf", "huggingface", "hugging")
MG_WORDS = ("mg", "megatron", "mcore")


@dataclass(frozen=True)
class Prepared:
    """A conversion with every decision made."""

    direction: str
    source: Checkpoint
    specs: dict[str, Spec]
    layout: MegatronLayout | None
    target: Path
    transforms: dict[str, Transform]
    choices: tuple[str, ...]
    changes: tuple[str, ...]
    iteration: str
    vocab_multiple: int
    max_shard_bytes: int
    format: str
    optimizer: OptimizerState | None

    def draft(self, directory: Path) -> Draft:
        """Plan every file of the result below a directory."""
        if self.layout is None:
            return draft_hf(self.source, self.specs, directory, self.max_shard_bytes)
        if self.format == "torch_dist":
            return draft_torch_dist(self.source, self.layout, directory, self.iteration, self.vocab_multiple)
        return draft_megatron(self.source, self.layout, directory, self.iteration, self.vocab_multiple, self.optimizer)


def plan(config: ConvertConfig) -> Plan:
    """Return what `ferry convert` would do."""
    if is_gguf(config):
        return plan_gguf(config)
    prepared = prepare(config)
    draft = prepared.draft(prepared.target)
    check_target(prepared.target, draft.num_bytes, overwrite=config.overwrite)
    read_bytes = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in prepared.specs.values())
    names = {"hf": "Hugging Face", "megatron": "Megatron torch", "torch_dist": "Megatron torch_dist"}
    files = [PlannedFile(str(file.path.relative_to(prepared.target)), file.num_bytes) for file in draft.files]
    for name, content in {**draft.small, **draft.last}.items():
        files.append(PlannedFile(name, content.stat().st_size if isinstance(content, Path) else len(content)))
    family, dims = prepared.source.model.family, prepared.source.model.dims
    return Plan(
        verb="convert",
        summary=f"{names[prepared.source.format]} -> {names[draft.format]}{describe(prepared.layout)}: "
        f"{family.name}, {dims.num_layers} layers, {len(prepared.specs)} tensors",
        inputs={"source": content_id(prepared.source)},
        output=str(prepared.target),
        files=tuple(files),
        read_bytes=read_bytes,
        write_bytes=draft.num_bytes,
        memory_bytes=INTERPRETER_BYTES + config.threads * 4 * WINDOW_BYTES,
        choices=prepared.choices,
        details={
            "direction": prepared.direction,
            "layout": draft.layout,
            "output": str(prepared.target),
            "hash": config.hash,
            "optimizer": config.optimizer,
        },
    )


def describe(layout: MegatronLayout | None) -> str:
    """Return a layout in words: ` TP3 x PP2`."""
    if layout is None:
        return ""
    parts = [f"TP{layout.tp}", f"PP{layout.pp}"]
    parts += [f"VPP{layout.vpp}"] if layout.vpp > 1 else []
    parts += [f"EP{layout.ep}"] if layout.ep > 1 else []
    return " " + " x ".join(parts)


def prepare(config: ConvertConfig) -> Prepared:
    """Open the source, decide everything, and refuse what is impossible. Writes nothing."""
    source_path, target = source_and_target(config)
    source = open_checkpoint(source_path, config.hf_assets)
    direction = _direction(config, source)
    choices = [f"family {source.model.family.name}: config.json says model_type {source.model.config['model_type']!r}"]
    if config.model_type:
        check_name(source.model.family, config.model_type, str(source_path))
    _check_source_layout(config, source)
    changes = _changed_assets(source)
    if config.hf_assets is not None:
        source = _with_tokenizer_of(source, config.hf_assets)
    transforms: dict[str, Transform] = {}
    layout = None
    if direction == "mg2hf":
        refuse_layout(config, direction)
        if _is_original(target):
            target = target / "mg2hf"
            choices.append(f"target {target.name}/ below the directory given: that is a model and stays as it is")
    else:
        layout, why = _layout(config, source)
        choices += why
    check_apart(target, source.directory, config.hf_assets)
    lacking = missing_assets(source.assets)
    if lacking:
        choices.append(f"missing in the source, so also in the result: {', '.join(lacking)}")
    if source.model.family.normalised_head and direction == "hf2mg":
        head = source.model.part(HEAD).name
        transforms[head] = normalise_rows
        changes.append(f"{head}: each row divided by its length (NormHead), as the model does at run time")
    optimizer, left_behind = _training_state(config, source, direction)
    changes += left_behind
    if optimizer is not None:
        choices.append(f"optimizer state: {len(optimizer.specs)} tensors ({', '.join(optimizer.kinds)}) carried along")
    note = scaling_note(source.model.config)
    choices += [note] if note and layout else []
    return Prepared(
        direction=direction,
        source=source,
        specs=source.specs() | (optimizer.specs if optimizer else {}),
        layout=layout,
        target=target,
        transforms=transforms,
        choices=(*choices, *changes),
        changes=tuple(changes),
        iteration=_iteration(config, source),
        vocab_multiple=_vocab_multiple(config, source),
        max_shard_bytes=config.max_shard_size,
        format=config.format,
        optimizer=optimizer,
    )


def _direction(config: ConvertConfig, source: Checkpoint) -> str:
    asked = {"hf2hg": "hf2mg"}.get(config.direction, config.direction)
    from_hf = source.format == "hf"
    _check_words(config, asked)
    if asked == "auto":
        wants_hf = any(word in config.save_model_type.lower() for word in HF_WORDS)
        return "hf2mg" if from_hf else ("mg2hf" if wants_hf or not layout_options(config) else "mg2mg")
    if from_hf != asked.startswith("hf"):
        found = "a Hugging Face model" if from_hf else f"a Megatron checkpoint ({source.format})"
        raise ConfigError(
            f"{asked} was asked for, but {source.directory} is {found}",
            code="convert.direction",
            repair="leave the direction out, or exchange source and target",
        )
    return asked


def _check_words(config: ConvertConfig, direction: str) -> None:
    """Refuse the manual's loader and saver names where they contradict the direction."""
    for flag, value, end in (
        ("--loader", config.loader, 0), ("--saver", config.saver, 1), ("--save-model-type", config.save_model_type, 1)
    ):  # fmt: skip
        word = value.lower()
        if not word:
            continue
        is_hf, is_mg = any(w in word for w in HF_WORDS), any(w in word for w in MG_WORDS)
        if not is_hf and not is_mg and flag != "--loader":
            raise ConfigError(f"{flag} {value} is unknown, expected hf or megatron", code="convert.words")
        side = direction.split("2")[end] if "2" in direction else ""
        # The manual's saver is called megatron in both directions: only the model type tells.
        if flag != "--saver" and ((side == "hf" and is_mg and not is_hf) or (side == "mg" and is_hf and not is_mg)):
            raise ConfigError(f"{flag} {value} contradicts {direction}", code="convert.words", repair="leave it out")


def _check_source_layout(config: ConvertConfig, source: Checkpoint) -> None:
    for axis in ("tp", "pp"):
        expected = getattr(config, f"source_{axis}")
        found = source.layout.get(axis)
        if expected is not None and found is not None and expected != found:
            raise LayoutError(
                f"{source.directory} has {axis}={found}, expected {axis}={expected} (source_{axis}, or {axis.upper()})",
                code="layout.source",
                repair="correct or unset it: the layout of the source is detected",
            )


def _is_original(directory: Path) -> bool:
    """Say whether a directory is a model that came from no shards: the manual names it where the result goes."""
    manifest = manifest_of(directory)
    from_shards = manifest is not None and manifest.verb == "convert" and bool(manifest.parents)
    return (directory / "config.json").is_file() and not from_shards


def _changed_assets(source: Checkpoint) -> list[str]:
    """Name the assets that are no longer what the source's manifest says: they travel as they are now."""
    manifest = manifest_of(source.directory)
    if manifest is None:
        return []
    changed = [f"{name}: removed" for name in manifest.files if not (source.directory / name).is_file()]
    for name, path in source.assets.files.items():
        if path.is_relative_to(source.directory):
            promised = manifest.files.get(path.relative_to(source.directory).as_posix())
            if promised is None or promised.sha256 != file_sha256(path):
                changed.append(f"{name}: {'changed' if promised else 'added'}")
    return [f"{change} since the source was made" for change in sorted(changed)]


def _with_tokenizer_of(source: Checkpoint, tokenizer: Path) -> Checkpoint:
    """Take tokenizer files from another directory (or the directory of a tokenizer file), the rest stays."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = {name: path for name, path in find_assets(folder).files.items() if name != INDEX}
    config = {"config.json": source.assets.files["config.json"]}
    return replace(source, assets=Assets({**source.assets.files, **files, **config}))


def _layout(config: ConvertConfig, source: Checkpoint) -> tuple[MegatronLayout, list[str]]:
    """Return the layout of the result, or refuse with the legal values."""
    model = source.model
    _check_splits(config, model)
    vpp = config.vpp
    if config.layers_per_virtual_stage is not None:
        total = model.dims.num_layers + len(config.noop_layers)
        each = config.layers_per_virtual_stage * config.pp
        if total % each or config.vpp not in (1, total // each):
            raise LayoutError(
                f"{config.layers_per_virtual_stage} layers a virtual stage times pp={config.pp} does not fit {total} "
                f"layers{f' and vpp={config.vpp}' if config.vpp > 1 else ''}",
                code="layout.vpp",
                repair="choose a divisor of the layers of one pipeline stage",
            )
        vpp = total // each
    if vpp > 1 and config.pp == 1:
        raise LayoutError("vpp needs pp of 2 or more, found pp=1", code="layout.vpp", repair="leave vpp out")
    if config.format == "torch_dist" and (vpp > 1 or config.names == "classic"):
        raise LayoutError(
            "torch_dist has neither virtual stages nor the classic names: any layout can load it",
            code="layout.torch-dist",
            repair="leave --vpp and --names out",
        )
    padded = padded_vocabulary(model.dims.vocab_size, _vocab_multiple(config, source), config.tp)
    layout = MegatronLayout(
        tp=config.tp, pp=config.pp, vpp=vpp, ep=config.ep, layer_list=config.layer_list,
        noop_layers=config.noop_layers, names=config.names, experts=config.experts, padded_vocab=padded,
    )  # fmt: skip
    extra = padded - model.dims.vocab_size
    multiple = _vocab_multiple(config, source)
    why = f"vocabulary {model.dims.vocab_size} + {extra} rows of zeros = {padded}: a multiple of {multiple} x tp"
    return layout, [why] if extra else []


def _check_splits(config: ConvertConfig, model: Model) -> None:
    dims, name = model.dims, model.config.get("_name_or_path") or model.family.name
    if config.tp not in model.legal_tp():
        limits = {"num_attention_heads": dims.num_heads, "num_key_value_heads": dims.num_groups}
        if not dims.num_experts or dims.dense_layers:
            limits["intermediate_size"] = dims.ffn_hidden_size
        if dims.num_experts:
            limits["moe_intermediate_size"] = dims.expert_ffn_hidden_size
        reason = ", ".join(f"{key}={value}" for key, value in limits.items() if value % config.tp)
        raise LayoutError(
            f"tp={config.tp} does not divide {reason} ({name})",
            code="layout.tp",
            repair=f"use {_either(model.legal_tp())}",
        )
    if config.ep not in model.legal_ep():
        what = f"num_experts={dims.num_experts}" if dims.num_experts else "a model without experts"
        raise LayoutError(
            f"ep={config.ep} does not divide {what} ({name})",
            code="layout.ep",
            repair=f"use {_either(model.legal_ep())}",
        )


def _either(values: list[int]) -> str:
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _training_state(
    config: ConvertConfig, source: Checkpoint, direction: str
) -> tuple[OptimizerState | None, list[str]]:
    """Return the optimizer state to carry, and what is left behind in words; refuse to lose anything silently."""
    state = source.layout.get("training_state") or []
    if not state:
        return None, []
    if direction == "mg2hf":
        return None, [f"{', '.join(state)} stay behind: a Hugging Face model has no place for them"]
    if config.optimizer == "leave":
        return None, [f"{', '.join(state)} left behind as asked (--optimizer leave)"]
    if source.format != "megatron" or config.format != "torch" or "optimizer" not in state:
        raise LayoutError(
            f"{source.directory} holds {', '.join(state)}; they are carried between legacy torch layouts only",
            code="layout.optimizer",
            repair="--optimizer leave converts the weights alone; the trainer then starts with --no-load-optim",
        )
    lost = "random states belong to single ranks and stay behind: start with --no-load-rng"
    return read_optimizer(source), [lost]


def _iteration(config: ConvertConfig, source: Checkpoint) -> str:
    if config.iteration:
        return "release" if config.iteration == "release" else f"iter_{int(config.iteration):07d}"
    found = str(source.layout.get("iteration", "release"))
    return found if found == "release" or found.startswith("iter_") else "release"


def _vocab_multiple(config: ConvertConfig, source: Checkpoint) -> int:
    return int(config.vocab_multiple or source.layout.get("make_vocab_size_divisible_by") or DEFAULT_VOCAB_MULTIPLE)
