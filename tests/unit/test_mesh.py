"""Which loss would this catch? A mesh that is accepted and cannot be built, a legal one that is refused, a rank that
takes another rank's part, an estimate of memory that is too small.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.core.errors import FerryError
from ferry.core.family import Dims
from ferry.core.mesh import Mesh, Place, check_mesh, plan_mesh, trainable_tp
from ferry.core.training_memory import (
    Setup,
    flops_per_token,
    memory_per_rank,
    num_lora_parameters,
    num_parameters,
)

TINY = Dims(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_heads=8, num_groups=2, head_dim=8, vocab_size=101, tied=False
)
SIZES = st.integers(1, 5)


def refusal(dims: Dims, mesh: Mesh, **fields: object) -> FerryError:
    with pytest.raises(FerryError) as raised:
        check_mesh(dims, mesh, **fields)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    return raised.value


@given(SIZES, SIZES, SIZES)
def test_a_rank_has_one_place_and_a_place_has_one_rank(tp: int, pp: int, dp: int) -> None:
    mesh = Mesh(tp, pp, 1, dp)
    places = [mesh.place(rank) for rank in range(mesh.num_ranks)]
    assert len(set(places)) == mesh.num_ranks == tp * pp * dp
    assert [mesh.rank(place) for place in places] == list(range(mesh.num_ranks))


def test_ranks_are_numbered_as_megatron_numbers_them() -> None:
    mesh = Mesh(tp=2, pp=2, dp=2)
    assert mesh.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.place(6) == Place(pp=1, dp=1, tp=0)


def test_dp_is_what_tp_and_pp_leave() -> None:
    assert plan_mesh(8, tp=2, pp=2) == Mesh(2, 2, 1, 2)
    with pytest.raises(FerryError, match=r"tp\*pp=16 \(tp=8 pp=2\) does not divide 8 devices") as raised:
        plan_mesh(8, tp=8, pp=2)
    assert (raised.value.code, raised.value.exit_status) == ("mesh.devices", 4)


def test_tp_that_does_not_divide_the_heads_is_told_the_legal_sizes() -> None:
    error = refusal(TINY, Mesh(tp=3), model="Qwen2-7B")
    assert str(error) == "tp=3 does not divide num_heads=8 (Qwen2-7B); use 1, 2, 4 or 8"
    assert (error.code, error.exit_status) == ("mesh.tp", 4)


def test_fewer_kv_heads_than_tp_are_replicated() -> None:
    check_mesh(TINY, Mesh(tp=8))
    assert trainable_tp(TINY) == [1, 2, 4, 8]


def test_kv_heads_that_cannot_be_replicated_evenly_are_refused() -> None:
    dims = replace(TINY, num_heads=12, num_groups=3)
    error = refusal(dims, Mesh(tp=4))
    assert error.message == "tp=4 is no multiple of num_kv_heads=3 (the model)"
    assert trainable_tp(dims) == [1, 3, 6, 12]


def test_tp_must_divide_the_mlp_and_the_experts() -> None:
    assert "ffn_hidden_size=100" in refusal(replace(TINY, ffn_hidden_size=100), Mesh(tp=8)).message
    experts = replace(TINY, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=12)
    assert "expert_ffn_hidden_size=12" in refusal(experts, Mesh(tp=8)).message


def test_a_vocabulary_of_any_size_is_padded() -> None:
    assert TINY.vocab_size % 8
    check_mesh(TINY, Mesh(tp=8))


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (Mesh(pp=3), "pp=3 does not divide num_layers=4 (the model); use 1, 2 or 4"),
        (Mesh(pp=8), "pp=8 is more than num_layers=4 (the model); use 1, 2 or 4"),
        (Mesh(pp=2, vpp=4), "pp*vpp=8 is more than num_layers=4 (the model); use 1, 2 or 4"),
        (Mesh(vpp=2), "vpp=2 needs pp of 2 or more, found pp=1; use vpp=1, or raise pp"),
    ],
)
def test_stages_that_the_layers_do_not_fill_are_refused(mesh: Mesh, text: str) -> None:
    assert str(refusal(TINY, mesh)) == text


def test_uneven_stages_are_legal_where_a_layer_list_says_so() -> None:
    check_mesh(TINY, Mesh(pp=3), layer_list=(2, 1, 1))
    assert refusal(TINY, Mesh(pp=3), layer_list=(2, 1)).code == "layout.layer-list"


def test_ranks_and_devices_must_be_as_many() -> None:
    assert str(refusal(TINY, Mesh(2, 2), devices=8)) == "tp*pp*dp=4 (tp=2 pp=2 dp=1), found 8 devices; use dp=2"
    assert refusal(TINY, Mesh(2, 2), devices=6).code == "mesh.devices"
    check_mesh(TINY, Mesh(2, 2, 1, 2), devices=8)


def test_a_global_batch_splits_into_micro_batches_on_every_rank() -> None:
    error = refusal(TINY, Mesh(dp=4), micro_batch=2, global_batch=20)
    assert str(error) == "global_batch=20 is no multiple of micro_batch*dp=8 (2*4); use 16 or 24"
    assert (error.code, error.exit_status) == ("mesh.batch", 2)
    assert "multiple of pp=2 micro batches a step, found 3" in refusal(TINY, Mesh(pp=2, vpp=2), global_batch=3).message
    check_mesh(TINY, Mesh(dp=4), micro_batch=2, global_batch=24)


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    error = refusal(TINY, Mesh(), seq_len=8192, max_positions=4096, model="m")
    assert error.message == "seq_len=8192 is longer than max_positions=4096 of m"
    check_mesh(TINY, Mesh(), seq_len=4096, max_positions=4096)


@given(st.sampled_from([1, 2, 4, 8, 3, 5, 16]), st.integers(1, 8), st.integers(1, 3))
def test_every_mesh_that_is_let_through_has_whole_parts(tp: int, pp: int, dp: int) -> None:
    try:
        check_mesh(TINY, Mesh(tp, pp, 1, dp))
    except FerryError:
        assert TINY.num_heads % tp or TINY.ffn_hidden_size % tp or TINY.num_layers % pp
    else:
        assert not TINY.num_heads % tp
        assert not TINY.num_layers % pp
        assert TINY.num_groups % tp == 0 or tp % TINY.num_groups == 0


def shapes(dims: Dims) -> list[tuple[int, ...]]:
    """The tensors of a Llama with these sizes, written out."""
    key = dims.num_groups * dims.head_dim
    layer = [(64, 64), (key, 64), (key, 64), (64, 64), (96, 64), (96, 64), (64, 96), (64,), (64,)]
    return [*layer * dims.num_layers, (101, 64), (101, 64), (64,)]


def test_parameters_are_counted_from_the_sizes() -> None:
    assert num_parameters(TINY) == sum(prod(shape) for shape in shapes(TINY))
    assert num_parameters(replace(TINY, tied=True)) == num_parameters(TINY) - 101 * 64


def test_an_adapter_has_rank_rows_and_columns_beside_every_matrix() -> None:
    matrices = shapes(replace(TINY, num_layers=1))[:7]
    assert num_lora_parameters(TINY, 4) == 4 * sum(4 * (rows + cols) for rows, cols in matrices)


def test_training_all_weights_in_bf16_takes_18_bytes_a_parameter() -> None:
    """2 weight, 4 gradient, 4 master, 8 moments: the number of Megatron's documentation."""
    memory = memory_per_rank(TINY, Mesh(), Setup(16))
    assert memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes == 18 * num_parameters(TINY)
    sharded = memory_per_rank(TINY, Mesh(dp=4), Setup(16, sharding="optimizer"))
    assert sharded.optimizer_bytes == 3 * num_parameters(TINY)


def test_lora_keeps_no_gradients_of_the_base() -> None:
    memory, adapters = memory_per_rank(TINY, Mesh(), Setup(16, trainable="lora", lora_rank=4)), 4
    assert memory.gradients_bytes == 4 * num_lora_parameters(TINY, adapters)
    assert memory.optimizer_bytes == 12 * num_lora_parameters(TINY, adapters)
    assert memory.parameters_bytes == 2 * (num_parameters(TINY) + num_lora_parameters(TINY, adapters))


def test_full_sharding_over_many_ranks_leaves_little_more_than_two_gathered_layers() -> None:
    large = replace(TINY, num_layers=64)
    alone = memory_per_rank(large, Mesh(), Setup(16))
    sharded = memory_per_rank(large, Mesh(dp=64), Setup(16, sharding="full"))
    assert sharded.parameters_bytes < alone.parameters_bytes / 16
    assert sharded.optimizer_bytes == -(-alone.optimizer_bytes // 64)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from(["all", "lora"]))
def test_more_ranks_for_the_model_never_need_more_weights_on_a_rank(
    tp: int, pp: int, checkpointing: bool, trainable: str
) -> None:
    setup = Setup(128, 2, trainable, checkpointing=checkpointing)  # type: ignore[arg-type]
    alone, cut = memory_per_rank(TINY, Mesh(), setup), memory_per_rank(TINY, Mesh(tp, pp), setup)
    assert cut.parameters_bytes <= alone.parameters_bytes
    assert cut.optimizer_bytes <= alone.optimizer_bytes


def test_the_first_stage_of_a_pipeline_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    """1F1B: pp micro batches of layers/pp layers: as much as one rank without a pipeline, and what stages pass on."""
    setup = Setup(128)
    alone = memory_per_rank(TINY, Mesh(), setup).activations_bytes
    passed_on = 4 * 128 * 2 * 2 * TINY.hidden_size - 128 * 2 * TINY.hidden_size
    first = memory_per_rank(TINY, Mesh(pp=4), setup)
    # Without a pipeline the input of the only stage counts once.
    assert (first.stage, first.activations_bytes) == (0, alone + passed_on)


def test_checkpointing_keeps_one_whole_layer_and_the_inputs_of_the_others() -> None:
    setup = Setup(1024)
    deep = replace(TINY, num_layers=64)
    plain = memory_per_rank(deep, Mesh(), setup).activations_bytes
    assert memory_per_rank(deep, Mesh(), replace(setup, checkpointing=True)).activations_bytes < plain / 8


def test_the_largest_part_is_named() -> None:
    assert memory_per_rank(TINY, Mesh(), Setup(1)).largest_part() == "optimizer"
    assert memory_per_rank(TINY, Mesh(), Setup(100_000)).largest_part() == "activations"


def test_a_token_costs_six_operations_a_weight_and_four_a_frozen_one() -> None:
    matrices = sum(prod(shape) for shape in shapes(TINY) if len(shape) == 2) - 101 * 64  # the embedding is looked up
    attention = 6 * 32 * 4 * 64
    assert flops_per_token(TINY, 32) == 6 * matrices + attention
    assert flops_per_token(TINY, 32, "lora", 4) == 4 * matrices + 6 * num_lora_parameters(TINY, 4) + attention


def test_of_experts_only_the_chosen_ones_cost_operations_and_all_cost_memory() -> None:
    few = replace(TINY, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=96)
    many = replace(few, num_experts=8)
    assert flops_per_token(many, 32) - flops_per_token(few, 32) == 6 * 4 * 4 * 64  # only the router's rows
    assert num_parameters(many) - num_parameters(few) == 4 * (4 * 3 * 96 * 64 + 4 * 64)
