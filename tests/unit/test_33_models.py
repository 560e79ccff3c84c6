"""Which loss would this catch? A published model that is taken for another family, or whose tensors are not all known.

The number of parameters of a model's page is a checksum over every shape of its canonical tensors.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import tomllib

from ferry.core.errors import InputError
from ferry.families.registry import check_name, detect, families, model_of

MODELS: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent.parent / "golden/models.toml").read_text())
BEYOND_THE_SEED = ("qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b")


def test_the_table_holds_the_33_models_of_the_seed() -> None:
    assert len(MODELS) - len(BEYOND_THE_SEED) == 33


@pytest.mark.parametrize("name", MODELS)
def test_the_family_is_detected_from_the_config_alone(name: str) -> None:
    assert detect(MODELS[name]["config"], name).name == MODELS[name]["family"]


@pytest.mark.parametrize("name", MODELS)
def test_the_canonical_tensors_add_up_to_the_published_number_of_parameters(name: str) -> None:
    model = model_of(MODELS[name]["config"], name)
    assert sum(prod(shape) for shape in model.canonical().values()) == MODELS[name]["parameters"]


@pytest.mark.parametrize("name", MODELS)
def test_legal_tensor_parallel_sizes_are_the_powers_of_two_up_to_the_models_limit(name: str) -> None:
    model = model_of(MODELS[name]["config"], name)
    largest = MODELS[name]["largest_tp"]
    assert model.legal_tp() == [2**power for power in range(largest.bit_length())]


@pytest.mark.parametrize("name", MODELS)
def test_the_names_users_give_to_a_model_are_accepted_in_any_case(name: str) -> None:
    family = detect(MODELS[name]["config"], name)
    for alias in MODELS[name]["aliases"]:
        for spelling in (alias, alias.upper(), alias.capitalize(), alias.replace("-", "_")):
            check_name(family, spelling, name)


@pytest.mark.parametrize("name", MODELS)
def test_megatron_s_word_for_every_decoder_is_accepted(name: str) -> None:
    """The seed's scripts pass `--model-type GPT` for all models."""
    check_name(detect(MODELS[name]["config"], name), "GPT", name)


@pytest.mark.parametrize("name", ["llama2-7b", "qwen2-7b", "mixtral-8x7b"])
def test_the_name_of_another_family_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"is a .* model, --model-type says chatglm3") as raised:
        check_name(detect(MODELS[name]["config"], name), "chatglm3", name)
    assert raised.value.code == "family.mismatch"


def test_baichuan_1_is_not_taken_for_baichuan_2() -> None:
    config = MODELS["baichuan2-7b"]["config"] | {"vocab_size": 64000}
    with pytest.raises(InputError) as raised:
        detect(config, "Baichuan-7B")
    assert raised.value.code == "family.unknown"


def test_no_two_families_answer_to_the_same_name() -> None:
    names = [word for family in families().values() for word in {family.name, *family.models}]
    assert sorted(set(names)) == sorted(names)


def test_an_unknown_model_type_is_told_what_is_known() -> None:
    with pytest.raises(InputError, match=r"'lama'.*did you mean 'llama'") as raised:
        detect({"model_type": "lama"}, "config.json")
    assert raised.value.exit_status == 3
