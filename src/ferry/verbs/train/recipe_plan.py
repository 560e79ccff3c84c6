"""What a recipe alone says about a run: `ferry train --recipe ID --dry-run`, before there is a model or a device.

Devices, data-parallel size, batches and the memory of a rank follow from the model's sizes, which the recipes know.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ferry.core.errors import ConfigError
from ferry.core.mesh import Mesh, check_mesh
from ferry.core.plan import Plan
from ferry.core.training_memory import Setup, memory_per_rank, num_parameters
from ferry.core.units import size_text
from ferry.recipes.catalogue import corrected, find_model, find_recipe, problems
from ferry.verbs.train.config import TrainConfig

DTYPE: Literal["bf16"] = "bf16"
"""What the accelerators of the recipes compute in."""


def plan_recipe(config: TrainConfig) -> Plan:
    """Return what a recipe plans; what is given beside it (tp, pp, dp, batches, seq_len) counts instead."""
    row = find_recipe(config.recipe)
    recipe = corrected(row)
    known = find_model(recipe.model)
    own = recipe.mesh
    assert own is not None, "a corrected recipe has devices that its mesh divides"
    mesh = Mesh(config.tp or recipe.tp, config.pp or recipe.pp, config.layout.vpp, config.dp or own.dp)
    said = config.model_fields_set
    micro_batch = config.micro_batch if "micro_batch" in said else recipe.micro_batch
    seq_len = config.seq_len or recipe.seq_len
    global_batch = config.global_batch or micro_batch * mesh.dp * mesh.pp
    check_mesh(
        known.dims, mesh, model=recipe.model, micro_batch=micro_batch, global_batch=global_batch,
        layer_list=config.layout.layer_list,
    )  # fmt: skip
    trainable = "lora" if recipe.method == "lora" else "all"
    sharded = config.layout.shard == "full" or (config.layout.shard == "auto" and trainable == "all" and mesh.dp > 1)
    setup = Setup(
        seq_len, micro_batch, "lora" if trainable == "lora" else "all", DTYPE, config.layout.recompute,
        "full" if sharded else "none", lora_rank=config.lora.rank,
    )  # fmt: skip
    memory = memory_per_rank(known.dims, mesh, setup, config.layout.layer_list)
    recomputed = memory_per_rank(known.dims, mesh, replace(setup, checkpointing=True), config.layout.layer_list)
    num_micro = global_batch // (micro_batch * mesh.dp)
    notes = [f"recipe {recipe.id}: {problem.text}; taken: {problem.proposal}" for problem in problems(row)]
    parts = (
        ("parameters", memory.parameters_bytes), ("gradients", memory.gradients_bytes),
        ("optimizer", memory.optimizer_bytes), ("activations", memory.activations_bytes),
        ("logits", memory.logits_bytes),
    )  # fmt: skip
    shares = ", ".join(f"{name} {size_text(num_bytes)}" for name, num_bytes in parts)
    return Plan(
        verb="train",
        summary=f"{recipe.method} of {recipe.model}, {num_parameters(known.dims) / 1e9:.3g} B parameters, on "
        f"{mesh.num_ranks} devices ({mesh}), steps of {global_batch} samples of {seq_len} tokens",
        inputs={"recipe": recipe.id},
        memory_bytes=memory.total_bytes,
        choices=(
            *notes,
            f"GBS {global_batch}: MBS {micro_batch} x dp {mesh.dp} x {num_micro} micro-batches",
            f"memory of a rank about {size_text(memory.total_bytes)} in {DTYPE}: {shares}",
            f"with layout.recompute=true about {size_text(recomputed.total_bytes)}",
            "to train it: give --model, --data and --output, on these devices",
        ),
        details={
            "recipe": recipe.id,
            "mesh": mesh._asdict(),
            "devices": mesh.num_ranks,
            "global_batch": global_batch,
            "micro_batch": micro_batch,
            "seq_len": seq_len,
            "memory_per_rank": memory._asdict(),
        },
    )


def refuse_to_train(config: TrainConfig) -> None:
    """Refuse to run a recipe without a model: it can only be planned."""
    if config.model is None:
        raise ConfigError(
            f"the recipe {config.recipe} says how to train, not what",
            code="config.missing",
            repair="give --model, --data and --output; --dry-run shows its plan without them",
        )
