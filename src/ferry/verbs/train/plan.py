"""What a training run would do: model, mesh, batches, memory and output are decided and refused here, from headers.

The data are only looked for; they are read, checked and tokenised when the run begins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.core.environment import usable_cores
from ferry.core.errors import ConfigError, InputError
from ferry.core.family import Model
from ferry.core.mesh import Mesh, check_mesh, plan_mesh
from ferry.core.plan import Plan
from ferry.core.staging import check_apart, check_target
from ferry.core.training_memory import MemoryEstimate, Setup, flops_per_token, memory_per_rank, num_parameters
from ferry.core.units import size_text
from ferry.data.settings import parse_item
from ferry.data.vision.layout import check_layout, tower_sentence
from ferry.data.vision.pictures import VisionSpec, vision_spec
from ferry.devices.device import Device, find
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import content_id, manifest_of
from ferry.formats.opening import open_checkpoint
from ferry.formats.peft import check_base, check_fits, named_for, open_adapter
from ferry.formats.peft_targets import target_modules
from ferry.recipes.catalogue import Recipe, corrected, find_recipe, problems
from ferry.verbs.train import merge, runfiles
from ferry.verbs.train.config import TrainConfig
from ferry.verbs.train.crew.seat import cluster_from_environment
from ferry.verbs.train.recipe_plan import plan_recipe

DEFAULT_SEQ_LEN = 2048
DEFAULT_GLOBAL_BATCH = 8
LR = {"lora": 2e-4, "sft": 2e-5, "pretrain": 2e-5}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Prepared:
    """A run with every decision made that needs no data."""

    config: TrainConfig
    source: Checkpoint
    assets: Path
    mesh: Mesh
    device: Device
    dtype: str
    seq_len: int
    global_batch: int
    lr: float
    sharded: bool
    modules: tuple[str, ...]
    memory: MemoryEstimate
    choices: tuple[str, ...]

    @property
    def model(self) -> Model:
        return self.source.model

    @property
    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on with the other's checkpoints, but for the data."""
        config = self.config
        rows = config.rows.model_dump(
            mode="json", exclude={"workers", "cache", "packing", "validation", "validate_every", "chat_template"}
        )
        return {
            "model": content_id(self.source),
            "method": config.method,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "lr": self.lr,
            "seed": config.seed,
            "dtype": self.dtype,
            "optimizer": config.optimizer.model_dump(mode="json"),
            "rows": rows,
            "lora": {**config.lora.model_dump(mode="json"), "modules": len(self.modules)} if self.modules else {},
            "adapter": str(manifest_id(config.adapter)) if config.adapter else "",
            **({"image_processor": self.vision.processor_sha256} if self.vision else {}),
        }

    @property
    def vision(self) -> VisionSpec | None:
        """Return how pictures enter; None where they cannot, or are not asked for."""
        return vision_spec(self.model, self.assets) if self.config.method != "pretrain" else None

    def flops(self) -> float:
        """Return the operations of one token, for the model's flops utilisation."""
        trainable = "lora" if self.modules else "all"
        return flops_per_token(self.model.dims, self.seq_len, trainable, self.config.lora.rank)  # type: ignore[arg-type]


def plan(config: TrainConfig) -> Plan:
    """Return what `ferry train` would do."""
    if config.is_recipe_alone:
        return plan_recipe(config)
    assert config.model is not None
    assert config.output is not None
    if config.action == "merge":
        return _plan_merge(config)
    prepared = prepare(config)
    if config.action == "tokens":
        return _plan_tokens(config, prepared)
    state = runfiles.check_output(config.output, prepared.identity, overwrite=config.overwrite)
    dims, mesh = prepared.model.dims, prepared.mesh
    steps = f"{config.steps} steps" if config.steps else f"{config.epochs or 1:g} epochs"
    return Plan(
        verb="train",
        summary=f"{config.method} of {prepared.model.family.name}, {num_parameters(dims) / 1e6:.1f} M parameters, on "
        f"{mesh.num_ranks} {prepared.device.type} rank{'s' if mesh.num_ranks > 1 else ''} ({mesh}), {steps} of "
        f"{prepared.global_batch} samples",
        inputs={"model": content_id(prepared.source), **{f"data {item}": _data_id(item) for item in config.data}},
        output=str(main_result(config)),
        memory_bytes=prepared.memory.total_bytes,
        choices=(*prepared.choices, *([state] if state else [])),
        details={
            "mesh": mesh._asdict(),
            "devices": mesh.num_ranks,
            "steps": config.steps,
            "epochs": config.epochs,
            "global_batch": prepared.global_batch,
            "micro_batch": config.micro_batch,
            "seq_len": prepared.seq_len,
            "lr": prepared.lr,
            "dtype": prepared.dtype,
            "sharded": prepared.sharded,
            "memory_per_rank": prepared.memory._asdict(),
            "identity": prepared.identity,
            "export": config.export,
            "merge": config.merge,
        },
    )


def prepare(config: TrainConfig) -> Prepared:
    """Decide everything that needs no data, and refuse what is impossible. Writes nothing."""
    assert config.model is not None
    source = open_checkpoint(config.model)
    choices: list[str] = []
    recipe = _recipe(config, choices)
    if recipe is not None:
        config = _with_recipe(config, recipe)
    dims, where = source.model.dims, str(config.model)
    device = find(config.device)
    mesh = _mesh(config, device, recipe, choices)
    seq_len = config.seq_len or min(_max_positions(source.model) or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
    global_batch = config.global_batch or max(DEFAULT_GLOBAL_BATCH, config.micro_batch * mesh.dp)
    check_mesh(
        dims, mesh, model=where, seq_len=seq_len, max_positions=_max_positions(source.model),
        layer_list=config.layout.layer_list, micro_batch=config.micro_batch,
        global_batch=global_batch if config.method == "pretrain" else None,
    )  # fmt: skip
    read = [parse_item(item).path for item in (*config.data, *config.rows.validation)]
    if config.overwrite:
        assert config.output is not None
        check_apart(config.output, config.model, config.adapter, config.rows.chat_template, config.rows.cache, *read)
    dtype = _dtype(config, device, choices)
    if source.model.family.vision is not None:
        check_layout(source, mesh)
        choices.append(tower_sentence(source))
    sharded = _sharded(config, mesh, choices)
    modules = _modules(config, source, choices)
    setup = Setup(
        seq_len, config.micro_batch, "lora" if modules else "all", DTYPES[dtype],  # type: ignore[arg-type]
        config.layout.recompute, "full" if sharded else "none", lora_rank=config.lora.rank,
    )  # fmt: skip
    memory = memory_per_rank(dims, mesh, setup, config.layout.layer_list)
    _check_memory(memory, mesh, device, choices)
    lr = config.lr or LR[config.method]
    return Prepared(
        config, source, _assets_directory(source), mesh, device, dtype, seq_len, global_batch, lr, sharded, modules,
        memory, tuple(choices),
    )  # fmt: skip


def manifest_id(directory: Path) -> str:
    """Return the id of an artifact, or its place where it has none."""
    manifest = manifest_of(directory)
    return manifest.id if manifest else directory.name


def threads_of(prepared: Prepared) -> int:
    """Return the threads of each process: the cores shared out among the ranks of this node."""
    nodes = cluster_from_environment().num_nodes
    return prepared.config.crew.threads or max(1, usable_cores() * nodes // prepared.mesh.num_ranks)


def _plan_tokens(config: TrainConfig, prepared: Prepared) -> Plan:
    assert config.output is not None
    check_target(config.output, overwrite=config.overwrite)
    kind = "text_document" if config.method == "pretrain" else "packed documents"
    return Plan(
        verb="train",
        summary=f"tokenise for {config.method} and write Megatron's .bin and .idx: {kind}",
        inputs={"tokenizer": str(prepared.assets), **{f"data {item}": _data_id(item) for item in config.data}},
        output=str(config.output),
        details={"action": "tokens", "seq_len": prepared.seq_len},
    )


def _plan_merge(config: TrainConfig) -> Plan:
    assert config.model is not None
    assert config.output is not None
    assert config.adapter is not None
    merging = merge.prepare(config.model, config.adapter)
    check_target(config.output, merging.draft(config.output).num_bytes, overwrite=config.overwrite)
    return Plan(
        verb="train",
        summary=f"merge {len(merging.adapter.modules)} modules of {config.adapter.name} into {config.model.name}",
        inputs={"model": content_id(merging.source), "adapter": manifest_id(config.adapter)},
        output=str(config.output),
        write_bytes=merging.draft(config.output).num_bytes,
        choices=merging.changes,
        details={"action": "merge"},
    )


def _recipe(config: TrainConfig, choices: list[str]) -> Recipe | None:
    if not config.recipe:
        return None
    recipe = find_recipe(config.recipe)
    for problem in problems(recipe):
        choices.append(f"recipe {recipe.id}: {problem.text}; taken: {problem.proposal}")
    return corrected(recipe)


def _with_recipe(config: TrainConfig, recipe: Recipe) -> TrainConfig:
    """Return the config with what the recipe says, where the user has not said it."""
    said = config.model_fields_set
    values: Mapping[str, Any] = {
        "tp": recipe.tp, "pp": recipe.pp, "micro_batch": recipe.micro_batch, "seq_len": recipe.seq_len,
        "method": "lora" if recipe.method == "lora" else config.method,
    }  # fmt: skip
    return config.model_copy(update={key: value for key, value in values.items() if key not in said})


def _mesh(config: TrainConfig, device: Device, recipe: Recipe | None, choices: list[str]) -> Mesh:
    """Return the mesh: dp takes what devices tp and pp leave; on the CPU ranks are processes, as many as asked for."""
    tp, pp, vpp = config.tp or 1, config.pp or 1, config.layout.vpp
    world = int(os.environ["WORLD_SIZE"]) if os.environ.get("WORLD_SIZE", "").isdigit() else 0
    nodes = cluster_from_environment().num_nodes
    if config.dp is not None:
        mesh = Mesh(tp, pp, vpp, config.dp)
    elif world:
        mesh = plan_mesh(world, tp, pp, vpp)
    elif device.type == "cpu":
        dp = recipe.mesh.dp if recipe is not None and recipe.mesh is not None else 1
        mesh = Mesh(tp, pp, vpp, dp)
    else:
        mesh = plan_mesh(device.count() * nodes, tp, pp, vpp)
        choices.append(f"{mesh}: {device.count() * nodes} devices of type {device.type}")
    if world and world != mesh.num_ranks:
        raise ConfigError(
            f"WORLD_SIZE={world}, but tp*pp*dp={mesh.num_ranks} ({mesh})",
            code="train.world-size",
            repair=f"start {mesh.num_ranks} processes, or change --tp, --pp or --dp",
        )
    if mesh.num_ranks % nodes:
        raise ConfigError(
            f"{mesh.num_ranks} ranks ({mesh}) on {nodes} nodes: every node needs the same number",
            code="train.nodes",
            repair="change --dp, or NNODES",
        )
    return mesh


def _max_positions(model: Model) -> int | None:
    found = model.family.read("max_positions", model.config)
    return int(found) if found is not None else None


def _dtype(config: TrainConfig, device: Device, choices: list[str]) -> str:
    choice = device.dtype()
    if config.dtype == "auto":
        choices.append(f"computed in {choice.dtype}: {choice.reason}")
        return choice.dtype
    if config.dtype != choice.dtype:
        choices.append(f"computed in {config.dtype} as told, although {choice.reason}")
    return config.dtype


def _sharded(config: TrainConfig, mesh: Mesh, choices: list[str]) -> bool:
    if mesh.dp == 1:
        return False
    wish = config.layout.shard
    sharded = wish == "full" or (wish == "auto" and config.method != "lora")
    how = "sharded over dp (FSDP2)" if sharded else "replicated over dp, gradients summed"
    why = ": the base is frozen, only adapters are summed" if config.method == "lora" and not sharded else ""
    choices.append(f"parameters are {how}{why}")
    return sharded


def _modules(config: TrainConfig, source: Checkpoint, choices: list[str]) -> tuple[str, ...]:
    if config.method != "lora":
        return ()
    if config.adapter is None:
        return tuple(target_modules(source.model, config.lora.targets))
    adapter = named_for(open_adapter(config.adapter), source.model)
    check_fits(adapter, source.model, str(config.model))
    promised = manifest_of(source.directory)
    if promised is not None and promised.model_sha256:
        check_base(adapter, promised.model_sha256, str(config.model))
    ranks = {pair.a.shape[0] for pair in adapter.modules.values()}
    if ranks != {config.lora.rank}:
        raise ConfigError(
            f"{config.adapter} has rank {', '.join(map(str, sorted(ranks)))}, lora.rank is {config.lora.rank}",
            code="train.adapter-rank",
            repair="give the adapter's own: --set lora.rank=..., and its alpha",
        )
    scales = {adapter.scale(module) for module in adapter.modules}
    if scales != {config.lora.scale}:
        raise ConfigError(
            f"{config.adapter} is scaled by {', '.join(f'{scale:g}' for scale in sorted(scales))}, lora.alpha="
            f"{config.lora.alpha:g} and lora.rank={config.lora.rank} make {config.lora.scale:g}",
            code="train.adapter-scale",
            repair="give the adapter's own alpha: --set lora.alpha=..., and lora.rslora if it has that",
        )
    choices.append(f"goes on with the adapter {config.adapter.name}: {len(adapter.modules)} modules")
    return tuple(adapter.modules)


def _check_memory(memory: MemoryEstimate, mesh: Mesh, device: Device, choices: list[str]) -> None:
    """Refuse what cannot fit, before anything is loaded; ranks on a CPU share its memory."""
    nodes = cluster_from_environment().num_nodes
    sharers = mesh.num_ranks // nodes if device.type == "cpu" else 1
    needed, there = memory.total_bytes * sharers, device.memory_bytes(0)
    choices.append(
        f"memory of a rank about {size_text(memory.total_bytes)}: parameters {size_text(memory.parameters_bytes)}, "
        f"gradients {size_text(memory.gradients_bytes)}, optimizer {size_text(memory.optimizer_bytes)}, activations "
        f"{size_text(memory.activations_bytes)}, logits {size_text(memory.logits_bytes)}"
    )
    if needed > there:
        advice = {
            "activations": "lower --micro-batch or --seq-len, or --set layout.recompute=true",
            "logits": "lower --seq-len",
        }.get(memory.largest_part(), "raise --tp, --pp or --dp (with layout.shard=full), or use --method lora")
        raise ConfigError(
            f"needs about {size_text(needed)}, the {device.type} has {size_text(there)}; the largest part is "
            f"{memory.largest_part()}",
            code="train.memory",
            repair=advice,
        )


def _assets_directory(source: Checkpoint) -> Path:
    """Return the directory with the config and the tokenizer of a model."""
    found = source.assets.files.get("config.json")
    if found is None:
        raise InputError(f"{source.directory} has no config.json", code="hf.no-config")
    return found.parent


def _data_id(item: str) -> str:
    """Return what changes when a data file changes."""
    path = parse_item(item).path
    if not path.is_file():
        return str(path)
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"


def wanted_results(config: TrainConfig) -> set[str]:
    """Return the artifacts that a run makes, by name."""
    if config.method == "lora":
        return {"adapter", "merged"} if config.merge else {"adapter"}
    return {"hf": {"model"}, "megatron": {"megatron"}, "both": {"model", "megatron"}}.get(config.export, set())


def main_result(config: TrainConfig) -> Path:
    """Return the artifact that a run is for; the directory of the run where it makes none."""
    assert config.output is not None
    if config.method == "lora":
        return config.output / "adapter"
    names = {"hf": "model", "both": "model", "megatron": "megatron"}
    return config.output / names[config.export] if config.export in names else config.output
