"""Which loss would this catch? A row of the manual that is lost or mended in silence, a contradiction that nobody sees,
a proposal that does not fit the devices.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomllib

from ferry.control.recipes.config import RecipesConfig
from ferry.control.recipes.report import report
from ferry.control.recipes.run import run
from ferry.core.errors import FerryError
from ferry.core.family import Dims
from ferry.core.mesh import Mesh, check_mesh
from ferry.core.progress import Reporter
from ferry.core.training_memory import Setup, memory_per_rank, num_parameters
from ferry.families.registry import model_of
from ferry.recipes.catalogue import (
    Recipe,
    corrected,
    find_model,
    find_recipe,
    known_models,
    problems,
    recipes,
)
from ferry.recipes.proposal import HEADROOM, Hardware, fewest_devices, propose

GOLDEN: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent.parent / "golden/models.toml").read_text())
GOLDEN_NAMES = {"glm3-6b": "chatglm3-6b"}
"""Where the manual's name of a model is not the hub's."""
GB = 10**9


def setup_of(recipe: Recipe) -> Setup:
    return Setup(recipe.seq_len, recipe.micro_batch, "lora" if recipe.method == "lora" else "all")


def ask(**fields: Any) -> dict[str, Any]:
    """The verb's result, after a round trip through JSON."""
    result: dict[str, Any] = json.loads(json.dumps(run(RecipesConfig(**fields), Reporter())))
    return result


def test_all_128_rows_of_33_models_and_14_families_are_there() -> None:
    rows = recipes().values()
    assert (len(rows), len({row.model for row in rows}), len({row.family for row in rows})) == (128, 33, 14)
    assert Counter(row.method for row in rows) == {"full": 65, "lora": 63}
    assert Counter((row.tp, row.pp) for row in rows)[4, 1] == 21
    assert Counter(row.micro_batch for row in rows) == {1: 63, 2: 50, 4: 15}
    assert set(known_models()) == {row.model for row in rows}


def test_a_row_is_as_the_manual_prints_it() -> None:
    assert find_recipe("llama2-13b-lora-4096") == Recipe("llama2", "llama2-13b", "lora", 4096, 8, 1, 4, 1, 8)


@pytest.mark.parametrize("word", ["llama2-13b-sft-4096", "LLAMA2-13B-pretrain-4096", "llama2_13b_full_4096"])
def test_sft_and_pretraining_are_the_manual_s_full(word: str) -> None:
    assert find_recipe(word).id == "llama2-13b-full-4096"


def test_an_unknown_recipe_or_model_is_told_the_nearest() -> None:
    with pytest.raises(FerryError, match=r"did you mean 'llama2-13b-lora-4096'") as raised:
        find_recipe("lama2-13b-lora-4096")
    assert (raised.value.code, raised.value.exit_status) == ("recipes.unknown", 3)
    with pytest.raises(FerryError, match=r"did you mean 'qwen2-7b'"):
        find_model("qwen2-7")


@pytest.mark.parametrize("name", list(known_models()))
def test_the_sizes_of_a_model_are_those_its_family_reads_from_the_published_config(name: str) -> None:
    golden = GOLDEN[GOLDEN_NAMES.get(name, name)]
    dims = known_models()[name].dims
    assert dims == model_of(golden["config"], name).dims
    assert num_parameters(dims) == pytest.approx(golden["parameters"], rel=1e-3)  # biases are left out


def test_the_table_has_one_inconsistent_pair_and_three_blanks() -> None:
    found = {recipe.id: [problem.kind for problem in problems(recipe)] for recipe in recipes().values()}
    assert [name for name, kinds in found.items() if "devices" in kinds] == [
        "baichuan2-13b-full-8192",
        "baichuan2-13b-lora-8192",
    ]
    assert [name for name, kinds in found.items() if "blank" in kinds] == [
        "baichuan2-7b-lora-4096",
        "baichuan2-7b-full-8192",
        "baichuan2-7b-lora-8192",
    ]
    assert not [name for name, kinds in found.items() if "layout" in kinds]


def test_the_inconsistent_pair_is_kept_said_and_put_right() -> None:
    full, lora = find_recipe("baichuan2-13b-full-8192"), find_recipe("baichuan2-13b-lora-8192")
    assert (full.devices, full.mesh) == (8, None)
    assert (corrected(full).devices, corrected(lora).devices) == (16, 8)
    assert (corrected(full).mesh, corrected(lora).mesh) == (Mesh(8, 2), Mesh(8, 1))
    assert problems(full)[0].text == "tp*pp=16 (tp=8 pp=2) does not divide 8 devices"
    assert "look exchanged" in problems(full)[0].proposal


def test_an_impossible_row_without_a_partner_is_found_by_arithmetic_too() -> None:
    wrong = replace(find_recipe("llama2-7b-full-4096"), model="mistral-7b", seq_len=2048, pp=16)
    assert [problem.kind for problem in problems(wrong)] == ["devices"]
    assert corrected(wrong).devices == 16


def test_blank_rows_stay_blank_and_are_planned_from_the_sizes() -> None:
    recipe = find_recipe("baichuan2-7b-full-8192")
    assert (recipe.devices, recipe.mesh) == (None, None)
    assert (corrected(recipe).devices, corrected(recipe).mesh) == (4, Mesh(4, 1))


def test_every_recipe_is_a_mesh_its_model_can_have() -> None:
    for recipe in recipes().values():
        better = corrected(recipe)
        assert better.mesh is not None
        check_mesh(known_models()[recipe.model].dims, better.mesh, devices=better.devices, model=recipe.model)


def test_recipes_longer_than_the_model_say_so() -> None:
    assert [problem.kind for problem in problems(find_recipe("llama2-7b-full-8192"))] == ["positions"]
    assert not problems(find_recipe("llama2-7b-full-4096"))


def test_all_recipes_fit_64_gb_by_the_estimate_with_checkpointing() -> None:
    """The manual runs them on Ascend devices, which have up to 64 GB: a larger estimate would be wrong."""
    for recipe in recipes().values():
        mesh = corrected(recipe).mesh
        assert mesh is not None
        needed = memory_per_rank(known_models()[recipe.model].dims, mesh, replace(setup_of(recipe), checkpointing=True))
        assert needed.total_bytes <= 64 * GB, recipe.id


def test_a_proposal_needs_at_most_the_manual_s_ranks_in_127_of_128_rows() -> None:
    more = []
    for recipe in recipes().values():
        fewest = fewest_devices(known_models()[recipe.model].dims, Hardware(8, 64 * GB), setup_of(recipe))
        if fewest is None or fewest.num_ranks > recipe.tp * recipe.pp:
            more.append(recipe.id)
    assert more == ["glm3-6b-full-4096"]  # 64 GB are enough, a tenth less is not


@pytest.mark.parametrize("memory_gb", [64, 32])
@pytest.mark.parametrize("name", list(known_models()))
def test_a_proposal_is_legal_fits_and_is_the_same_each_time(name: str, memory_gb: int) -> None:
    dims = known_models()[name].dims
    for setup in (Setup(4096), Setup(8192), Setup(4096, trainable="lora"), Setup(4096, sharding="full")):
        smallest = fewest_devices(dims, Hardware(8, memory_gb * GB), setup)
        assert smallest is not None
        hardware = Hardware(2 * smallest.num_ranks, memory_gb * GB)
        proposal = propose(dims, hardware, setup, global_batch=64 * smallest.num_ranks, model=name)
        check_mesh(
            dims,
            proposal.mesh,
            devices=hardware.devices,
            micro_batch=proposal.micro_batch,
            global_batch=64 * smallest.num_ranks,
        )
        assert proposal.mesh.tp <= 8
        assert proposal.memory == memory_per_rank(dims, proposal.mesh, proposal.setup)
        assert proposal.memory.total_bytes <= (1 - HEADROOM) * memory_gb * GB
        assert proposal == propose(dims, hardware, setup, global_batch=64 * smallest.num_ranks, model=name)


def test_a_refused_proposal_says_how_many_devices_would_do() -> None:
    dims = known_models()["qwen2-72b"].dims
    with pytest.raises(FerryError, match=r"qwen2-72b does not fit 8 devices of 64 GB; .* needs .*, expected") as raised:
        propose(dims, Hardware(8, 64 * GB), Setup(4096), model="qwen2-72b")
    assert raised.value.code == "mesh.memory"
    assert "use a multiple of 32 devices (tp=8 pp=4), or --method lora" in raised.value.repair
    assert propose(dims, Hardware(32, 64 * GB), Setup(4096)).mesh == Mesh(8, 4)
    assert propose(dims, Hardware(8, 64 * GB), Setup(4096, trainable="lora")).mesh.num_ranks == 8


def test_a_proposal_fills_the_pipeline_with_the_global_batch() -> None:
    dims = known_models()["qwen2-72b"].dims
    proposal = propose(dims, Hardware(64, 64 * GB), Setup(4096), global_batch=8)
    assert proposal.mesh == Mesh(8, 4, 1, 2)
    assert (proposal.micro_batch, proposal.setup.num_micro_batches) == (1, 4)
    with pytest.raises(FerryError, match="no tp\\*pp divides them and the global batch"):
        propose(dims, Hardware(64, 64 * GB), Setup(4096), global_batch=0)


def test_sharding_is_named_where_it_would_make_the_model_fit() -> None:
    """Three devices divide neither heads nor layers: only data parallelism can use them."""
    dims = known_models()["llama2-7b"].dims
    with pytest.raises(FerryError) as raised:
        propose(dims, Hardware(3, 64 * GB), Setup(4096))
    assert "--sharding full" in raised.value.repair
    assert propose(dims, Hardware(3, 64 * GB), Setup(4096, sharding="full")).mesh == Mesh(dp=3)


def test_the_list_shows_the_table_and_what_is_wrong_with_it() -> None:
    result = ask()
    page = report(result)
    assert len(result["recipes"]) == 128
    assert "baichuan2-13b-full-8192: tp*pp=16 (tp=8 pp=2) does not divide 8 devices; 2 x 8 devices" in page
    assert page.count("the manual names no devices") == 3
    assert len(ask(model="Qwen2-7B", method="sft")["recipes"]) == 2
    assert report(ask(model="mixtral-8x7b", method="lora")) == "no recipes"


def test_a_recipe_is_shown_with_mesh_batch_memory_and_problems() -> None:
    result = ask(action="show", id="baichuan2-13b-full-8192")
    assert (result["mesh"], result["devices"]) == ({"tp": 8, "pp": 2, "vpp": 1, "dp": 1}, 16)
    assert result["recipe"]["nodes"] == 1
    assert result["global_batch"] == {"multiple_of": 1, "at_least": 8}
    memory = result["memory_per_rank"]
    assert memory["checkpointed"]["total_bytes"] < memory["plain"]["total_bytes"]
    page = report(result)
    for part in (
        "tp=8 pp=2 dp=1 on 16 devices",
        "look exchanged",
        "longer than max_positions=4096",
        "tokens/s/p = GBS",
    ):
        assert part in page


def test_a_proposal_for_a_directory_reads_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN["qwen3-8b"]["config"] | {"max_position_embeddings": 40960}))
    result = ask(action="propose", model=str(tmp_path), devices=8, memory_gb=64, method="sft", seq_len=8192)
    assert result["mesh"]["tp"] * result["mesh"]["pp"] * result["mesh"]["dp"] == 8
    assert result["max_positions"] == 40960
    assert "is the smallest tp*pp that fits" in report(result)
    with pytest.raises(FerryError, match="seq_len=50000 is longer than max_positions=40960"):
        ask(action="propose", model=str(tmp_path), seq_len=50_000)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["show"], "takes the id of a recipe"),
        (["propose"], "needs --model"),
        (["list", "llama2-7b-full-4096"], "takes no id"),
        (["--model", "lama2-7b"], "did you mean 'llama2-7b'"),
    ],
)
def test_words_that_do_not_fit_the_action_are_refused(words: list[str], text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ferry", "recipes", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert text in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_activations_of_a_real_layer_are_at_most_the_estimate_and_nearly_it(dtype: str) -> None:
    """What autograd saves for the backward pass of one Llama layer, counted by storage, without the parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = 128

    def saved_bytes(num_layers: int) -> int:
        config = LlamaConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=num_layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.model(input_ids=torch.arange(tokens)[None] % 64, use_cache=False)
        assert output.last_hidden_state.requires_grad
        return sum(kept[place].untyped_storage().nbytes() for place in kept.keys() - parameters)

    def estimate(num_layers: int) -> int:
        dims = Dims(num_layers, 128, 352, 4, 2, 32, 64, False)
        return memory_per_rank(dims, Mesh(), Setup(tokens, dtype=dtype)).activations_bytes  # type: ignore[arg-type]

    measured, estimated = saved_bytes(3) - saved_bytes(2), estimate(3) - estimate(2)
    assert 0.9 * estimated <= measured <= estimated


def test_train_plans_a_recipe_alone_and_refuses_to_run_it() -> None:
    import ferry
    from ferry.core.errors import ConfigError
    from ferry.verbs.train.config import TrainConfig
    from ferry.verbs.train.plan import plan

    config = TrainConfig.model_validate({"recipe": "baichuan2-13b-full-8192"})
    planned = plan(config)
    assert planned.details["devices"] == 16
    assert planned.details["mesh"] == {"tp": 8, "pp": 2, "vpp": 1, "dp": 1}
    assert any("look exchanged" in choice for choice in planned.choices)
    assert sum(value for key, value in planned.details["memory_per_rank"].items() if key.endswith("_bytes")) == (
        planned.memory_bytes
    )
    for recipe in recipes():
        assert plan(TrainConfig.model_validate({"recipe": recipe})).memory_bytes > 0
    with pytest.raises(ConfigError, match="says how to train, not what"):
        ferry.train(recipe="llama2-13b-lora-4096")
