"""Which loss would these tests catch? A picture that reaches the wrong places, positions that are not those of the
model, a tower that is trained or lost, an adapter whose names nobody loads.

transformers and PEFT judge: they are given the same pictures by code of their own (`vision_models.reference_loss`).
Losses are means of some dozen float32 terms near 5, computed in another order: they agree within TOLERANCE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from ferry.core.errors import InputError, LayoutError
from ferry.verbs.train.plan import prepare
from training import digests, lines, losses, settings, train, worst
from vision_models import as_on_the_hub, make_data, make_model, reference_loss, tower_of

TOLERANCE = 1e-6
CONSTANT = {"schedule": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return make_model(place / "model")


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return make_data(place / "data")


@pytest.fixture(scope="module")
def validation(place: Path) -> Path:
    """Three of the conversations: the same file may not be trained on and validated on."""
    path = make_data(place / "validation")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    return path


@pytest.fixture(scope="module")
def alone(place: Path, model: Path, data: Path, validation: Path) -> Path:
    """A run of six steps on one rank, exported."""
    train(configured(model, data, place / "alone", export="hf", rows={"validation": (str(validation),)}))
    return place / "alone"


def configured(model: Path, data: Path, output: Path, **fields: Any) -> Any:
    common = {"steps": 6, "save_every": 3, "global_batch": 4, "seq_len": 256, "optimizer": CONSTANT}
    return settings(model=model, data=(str(data),), output=output, **{**common, **fields})


def validation_loss(output: Path) -> float:
    found = [line for line in lines(output / "metrics.jsonl") if "validation_loss" in line]
    return float(found[-1]["validation_loss"])


def test_the_loss_of_the_first_step_is_that_of_transformers(alone: Path, model: Path, data: Path) -> None:
    assert losses(alone)[0] == pytest.approx(reference_loss(model, data), rel=TOLERANCE)
    assert losses(alone)[-1] < losses(alone)[0] - 0.5, "a model that does not learn proves little"


def test_the_pictures_are_seen(model: Path, data: Path, alone: Path, tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    pictures = sorted((tmp_path / "data").glob("*.png"))
    first, last = pictures[0].read_bytes(), pictures[-1].read_bytes()
    pictures[0].write_bytes(last)
    pictures[-1].write_bytes(first)
    train(configured(model, tmp_path / "data/rows.jsonl", tmp_path / "run", steps=1))
    assert worst(losses(tmp_path / "run"), losses(alone)[:1]) > 20 * TOLERANCE


def test_the_exported_model_has_the_tower_bit_for_bit_and_our_last_validation_loss_in_transformers(
    alone: Path, model: Path, validation: Path
) -> None:
    before, after = tower_of(model), tower_of(alone / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reference_loss(alone / "model", validation) == pytest.approx(validation_loss(alone), rel=TOLERANCE)
    assert (alone / "model/preprocessor_config.json").read_bytes() == (model / "preprocessor_config.json").read_bytes()


def test_a_resumed_run_ends_in_the_same_bits(alone: Path, model: Path, data: Path, tmp_path: Path) -> None:
    train(configured(model, data, tmp_path / "run", steps=3))
    train(configured(model, data, tmp_path / "run", steps=6))
    assert digests(tmp_path / "run") == digests(alone)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"dp": 2, "layout": {"shard": "none"}}, id="dp2 replicated"),
        pytest.param({"dp": 2, "layout": {"shard": "full"}}, id="dp2 sharded"),
        pytest.param({"tp": 2}, id="tp2"),
        pytest.param({"tp": 2, "dp": 2}, id="tp2 dp2 sharded"),
        pytest.param({"rows": {"packing": False}, "layout": {"recompute": True}}, id="no packing, recomputed"),
    ],
)
def test_every_layout_has_the_losses_of_one_rank_and_gives_the_tower_back(
    fields: dict[str, Any], alone: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    train(configured(model, data, tmp_path / "run", export="hf", **fields))
    assert worst(losses(tmp_path / "run"), losses(alone)) <= TOLERANCE
    assert all(torch.equal(tensor, tower_of(model)[name]) for name, tensor in tower_of(tmp_path / "run/model").items())


def test_a_run_resumed_on_another_layout_goes_on_with_the_same_losses(
    alone: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    train(configured(model, data, tmp_path / "run", steps=3, tp=2))
    train(configured(model, data, tmp_path / "run", steps=6, dp=2))
    assert worst(losses(tmp_path / "run"), losses(alone)) <= TOLERANCE


def test_a_tied_model_with_the_config_of_the_hub_trains_and_loads(data: Path, validation: Path, tmp_path: Path) -> None:
    tied = as_on_the_hub(make_model(tmp_path / "made", tied=True), tmp_path / "hub")
    rows = {"validation": (str(validation),)}
    train(configured(tied, data, tmp_path / "run", steps=2, export="hf", rows=rows))
    assert losses(tmp_path / "run")[0] == pytest.approx(reference_loss(tied, data), rel=TOLERANCE)
    found = reference_loss(tmp_path / "run/model", validation)
    assert found == pytest.approx(validation_loss(tmp_path / "run"), rel=TOLERANCE)


LORA = {"method": "lora", "lora": {"rank": 4, "targets": ("q_proj", "v_proj", "mlp")}, "lr": 1e-2}


def test_an_adapter_loads_in_peft_and_merged_it_is_the_same_model(
    model: Path, data: Path, validation: Path, tmp_path: Path
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    rows = {"validation": (str(validation),)}
    train(configured(model, data, tmp_path / "run", merge=True, rows=rows, **LORA))
    assert losses(tmp_path / "run")[0] == pytest.approx(reference_loss(model, data), rel=TOLERANCE)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.1
    names = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    expected = validation_loss(tmp_path / "run")
    assert reference_loss(adapted, validation) == pytest.approx(expected, rel=TOLERANCE)
    assert reference_loss(tmp_path / "run/merged", validation) == pytest.approx(expected, rel=TOLERANCE)
    assert all(torch.equal(tensor, tower_of(model)[name]) for name, tensor in tower_of(tmp_path / "run/merged").items())
    train(configured(model, data, tmp_path / "on", steps=1, adapter=tmp_path / "run/adapter", **LORA))
    assert losses(tmp_path / "on")[0] < losses(tmp_path / "run")[-1]


def test_an_adapter_made_by_peft_on_the_whole_model_is_merged_into_the_same_modules(
    model: Path, data: Path, tmp_path: Path
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    from ferry.core.progress import Reporter
    from ferry.verbs.train.merge import merge

    base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    chosen = peft.LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern={"^model.language_model.layers.0.+": 20})
    adapted = peft.get_peft_model(base, chosen)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(model, tmp_path / "adapter", tmp_path / "merged", Reporter())
    expected = reference_loss(adapted, data)
    assert abs(expected - reference_loss(model, data)) > 1e-3
    assert reference_loss(tmp_path / "merged", data) == pytest.approx(expected, rel=TOLERANCE)


def test_a_pipeline_is_refused_before_anything_is_read(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"^pp=2: a qwen2_vl model .* use --pp 1 with --tp or --dp$") as caught:
        prepare(configured(model, data, tmp_path / "run", pp=2))
    assert caught.value.code == "train.vision-layout"


def test_a_picture_that_changes_during_a_run_stops_it(model: Path, tmp_path: Path) -> None:
    from ferry.data.vision.pictures import measured, patches, vision_spec

    make_data(tmp_path)
    spec = vision_spec(prepare(configured(model, tmp_path / "rows.jsonl", tmp_path / "run")).model, model)
    assert spec is not None
    picture = measured("0.png", str(tmp_path), spec)
    assert patches(picture, spec).high == picture.rows * 2
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    with pytest.raises(InputError, match=r"0\.png changed since the data were prepared") as caught:
        patches(picture, spec)
    assert caught.value.code == "data.picture-changed"
