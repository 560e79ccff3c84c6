"""Reads the catalogue, estimates memory and makes proposals; writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ferry.control.recipes.config import RecipesConfig
from ferry.core.mesh import Mesh, check_mesh
from ferry.core.progress import Reporter
from ferry.core.training_memory import (
    MemoryEstimate,
    Setup,
    Trainable,
    flops_per_token,
    memory_per_rank,
    num_parameters,
)
from ferry.core.verb import Result
from ferry.families.registry import model_of, read_config
from ferry.recipes.catalogue import (
    METHODS,
    KnownModel,
    Method,
    Recipe,
    corrected,
    find_model,
    find_recipe,
    known_models,
    problems,
    recipes,
)
from ferry.recipes.proposal import Hardware, propose

THROUGHPUT = "tokens/s/p = GBS * seq_len / (devices * seconds per step): padding counts as tokens"
LOW_BUBBLE = 4
"""Micro batches for each stage that keep the pipeline's bubble, (pp - 1) / (m + pp - 1), below a fifth."""
DEFAULT_SEQ_LEN = 4096


def run(config: RecipesConfig, reporter: Reporter) -> Result:
    """Do what `config.action` says."""
    actions = {"list": _list, "show": _show, "propose": _propose}
    return {"action": config.action, **actions[config.action](config)}


def _list(config: RecipesConfig) -> Result:
    if config.model:
        find_model(config.model)  # an unknown name is an error, not an empty list
    model = config.model.lower().replace("_", "-")
    chosen = [
        recipe
        for recipe in recipes().values()
        if model in ("", recipe.model)
        and (not config.method or METHODS[config.method] == recipe.method)
        and config.seq_len in (None, recipe.seq_len)
    ]
    return {"recipes": [_row(recipe) for recipe in chosen]}


def _row(recipe: Recipe) -> dict[str, Any]:
    """Return the row as the table has it; `problems` are beside it and never mended in silence."""
    return {
        "id": recipe.id,
        "family": recipe.family,
        "model": recipe.model,
        "method": recipe.method,
        "seq_len": recipe.seq_len,
        "tp": recipe.tp,
        "pp": recipe.pp,
        "dp": recipe.mesh.dp if recipe.mesh else None,
        "micro_batch": recipe.micro_batch,
        "nodes": recipe.nodes,
        "devices_per_node": recipe.devices_per_node,
        "devices": recipe.devices,
        "problems": [problem._asdict() for problem in problems(recipe)],
    }


def _show(config: RecipesConfig) -> Result:
    recipe = find_recipe(config.id)
    known, better = known_models()[recipe.model], corrected(recipe)
    assert better.mesh is not None
    memory = {}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        setup = Setup(recipe.seq_len, recipe.micro_batch, _trainable(recipe.method), config.dtype, checkpointing)
        memory[name] = _memory(memory_per_rank(known.dims, better.mesh, setup))
    return {
        "recipe": _row(recipe),
        "mesh": better.mesh._asdict(),
        "devices": better.devices,
        "dtype": config.dtype,
        "memory_per_rank": memory,
        **_model_facts(known, recipe.seq_len, recipe.method),
        **_batch_facts(better.mesh, recipe.micro_batch),
    }


def _propose(config: RecipesConfig) -> Result:
    known = _model(config.model)
    method = METHODS[config.method or "full"]
    setup = Setup(
        config.seq_len or DEFAULT_SEQ_LEN,
        trainable=_trainable(method),
        dtype=config.dtype,
        sharding=config.sharding,
    )
    hardware = Hardware(config.devices, int(config.memory_gb * 1e9))
    check_mesh(known.dims, Mesh(), model=known.name, seq_len=setup.seq_len, max_positions=known.max_positions or None)
    proposal = propose(known.dims, hardware, setup, model=known.name)
    return {
        "model": known.name,
        "method": method,
        "mesh": proposal.mesh._asdict(),
        "devices": config.devices,
        "device_memory_bytes": hardware.memory_bytes,
        "dtype": config.dtype,
        "sharding": config.sharding,
        "micro_batch": proposal.micro_batch,
        "checkpointing": proposal.checkpointing,
        "memory_per_rank": _memory(proposal.memory),
        "reasons": list(proposal.reasons),
        **_model_facts(known, setup.seq_len, method),
        **_batch_facts(proposal.mesh, proposal.micro_batch),
    }


def _model(word: str) -> KnownModel:
    """Return the model in a directory, or of the table."""
    path = Path(word)
    if not path.is_dir():
        return find_model(word)
    model = model_of(read_config(path / "config.json"), word)
    return KnownModel(path.resolve().name, model.dims, int(model.family.read("max_positions", model.config, 0)))


def _model_facts(known: KnownModel, seq_len: int, method: Method) -> dict[str, Any]:
    return {
        "parameters": num_parameters(known.dims),
        "max_positions": known.max_positions,
        "seq_len": seq_len,
        "flops_per_token": flops_per_token(known.dims, seq_len, _trainable(method)),
        "throughput": THROUGHPUT,
    }


def _batch_facts(mesh: Mesh, micro_batch: int) -> dict[str, Any]:
    """Return which global batches fit, and from which on the pipeline is busy."""
    multiple = micro_batch * mesh.dp
    return {
        "global_batch": {"multiple_of": multiple, "at_least": multiple * (LOW_BUBBLE * mesh.pp if mesh.pp > 1 else 1)}
    }


def _memory(estimate: MemoryEstimate) -> dict[str, int]:
    return {**estimate._asdict(), "total_bytes": estimate.total_bytes}


def _trainable(method: Method) -> Trainable:
    return "lora" if method == "lora" else "all"
