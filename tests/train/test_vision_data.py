"""Which loss would these tests catch? A picture of another row, a placeholder that is learned, half a picture, a row
that is left out without a word, a tower that a conversion loses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, Qwen2VLModel

import ferry
from ferry.core.errors import GateError, InputError, IntegrityError
from ferry.core.progress import Reporter
from ferry.data.prepare import PreparedData, prepare
from ferry.data.settings import DataSettings
from ferry.data.tokenset import TokenSet
from ferry.data.vision.pictures import vision_spec
from ferry.data.vision.places import Grid, axes
from ferry.formats.opening import open_checkpoint
from vision_models import IMAGE, as_on_the_hub, make_data, make_model, make_pictures, picture_talk, talk, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("vision") / "model")


def prepared(model: Path, data: Path, **fields: Any) -> PreparedData:
    spec = vision_spec(open_checkpoint(model).model, model)
    common = {"tokenizer_dir": model, "cache_dir": data.parent / "cache", "vision": spec, "seq_len": 256}
    return prepare(DataSettings(**{"data": (str(data),), **common, **fields}), Reporter())


def bad_rows(made: PreparedData) -> list[list[str]]:
    return list(made.facts["sets"][0]["rows"]["bad"])


def test_rows_of_llama_factory_give_the_tokens_and_pictures_of_messages(model: Path, tmp_path: Path) -> None:
    a, b, *_ = make_pictures(tmp_path)
    part = {"type": "image", "image": a}
    first = [part, {"type": "text", "text": "and "}, {**part, "image": b}, {"type": "text", "text": "?"}]
    messages = write_rows(tmp_path / "messages.jsonl", [talk(first, "Noise.")])
    turns = [{"from": "human", "value": "<image>and <image>?"}, {"from": "gpt", "value": "Noise."}]
    sharegpt = write_rows(tmp_path / "sharegpt.jsonl", [{"conversations": turns, "images": [a, b]}])
    ours, theirs = (prepared(model, path).train.sample(0) for path in (messages, sharegpt))
    assert ours.ids_T.tolist() == theirs.ids_T.tolist()
    assert ours.supervised_T.tolist() == theirs.supervised_T.tolist()
    assert ours.pictures == theirs.pictures
    assert [picture.name for picture in ours.pictures] == [a, b]


def test_a_picture_has_as_many_placeholders_as_the_model_gives_it_tokens_and_none_is_learned(
    model: Path, tmp_path: Path
) -> None:
    made = prepared(model, make_data(tmp_path), train_on="all")
    samples = [made.train.sample(index) for index in range(4)]
    for sample in samples:
        assert (sample.ids_T == IMAGE).sum() == sum(picture.rows * picture.columns for picture in sample.pictures)
        assert not sample.supervised_T[sample.ids_T == IMAGE].any()
    # 24 x 24 pixels, patches of 4, two by two of them a token; 8 x 64 as they are; 17 x 31 rounded to 16 x 32.
    assert [tuple(picture[3:]) for picture in samples[0].pictures] == [(3, 3)]
    assert [tuple(picture[3:]) for picture in samples[1].pictures] == [(4, 2), (8, 1)]
    assert samples[3].pictures == ()


def test_rows_with_pictures_that_cannot_be_used_are_counted_and_named(model: Path, tmp_path: Path) -> None:
    names = make_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes((tmp_path / names[0]).read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")
    rows = [
        picture_talk(names[0], "?", "Good."),
        picture_talk("absent.png", "?", "x"),
        picture_talk("broken.png", "?", "x"),
        picture_talk("text.png", "?", "x"),
        picture_talk("thin.png", "?", "x"),
        picture_talk("https://example.org/a.png", "?", "x"),
        {**talk("Where?", "x"), "images": [names[0]]},
        {**talk("<image> and <image>", "x"), "images": [names[0]]},
        talk([{"type": "video", "video": "a.mp4"}], "x"),
        talk("A literal <|image_pad|> in a text", "x"),
    ]
    made = prepared(model, write_rows(tmp_path / "rows.jsonl", rows), max_bad_fraction=1.0)
    assert made.train.num_samples == 1
    found = bad_rows(made)
    assert [where for where, _ in found] == [f"rows.jsonl:{line}" for line in range(2, 11)]
    expected = [
        "absent.png cannot be read: No such file", "broken.png is broken", "text.png is broken", "thin.png is refused",
        "is not a file", "names 1, its turns have 0", "names 1, its turns have 2", "of type 'video'",
        "names 0, its turns have 1",
    ]  # fmt: skip
    for (_, what), words in zip(found, expected, strict=True):
        assert words in what
    with pytest.raises(GateError, match=r"rows\.jsonl:2 the picture absent\.png"):
        prepared(model, tmp_path / "rows.jsonl")


def test_a_sample_is_left_out_where_cutting_it_would_cut_a_picture(model: Path, tmp_path: Path) -> None:
    a, *_ = make_pictures(tmp_path)
    early = picture_talk(a, "?", "A long answer that will be cut. " * 4)
    late = talk("Hi.", "Hello. " * 4, [{"type": "image", "image": a}], "Noise.")
    made = prepared(model, write_rows(tmp_path / "rows.jsonl", [early, late]), seq_len=64, truncation="cut")
    assert made.train.num_samples == 1
    assert len(made.train.sample(0).ids_T) == 64
    assert made.facts["sets"][0]["rows"]["num_too_long"] == 2
    assert "rows.jsonl: 1 pictures; samples of which a picture would be cut are left out" in made.choices


def test_tokens_are_made_again_when_a_picture_or_the_image_processor_changes(model: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    first = prepared(model, data)
    again = prepared(model, data)
    assert again.directories == first.directories
    assert again.train.sha256 == first.train.sha256
    pixels = np.zeros((24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data/0.png")
    changed = prepared(model, data)
    assert changed.train.sha256 != first.train.sha256
    assert tuple(changed.train.sample(0).pictures[0][3:]) == (3, 5)
    shutil.copytree(model, tmp_path / "other")
    settings_ = json.loads((model / "preprocessor_config.json").read_text())
    settings_["size"]["longest_edge"] = 256
    (tmp_path / "other/preprocessor_config.json").write_text(json.dumps(settings_))
    smaller = prepared(tmp_path / "other", data)
    assert smaller.directories != changed.directories
    assert smaller.facts["num_tokens"] < changed.facts["num_tokens"]


def test_the_digest_of_data_does_not_depend_on_where_it_lies_but_pictures_are_found(
    model: Path, tmp_path: Path
) -> None:
    here = prepared(model, make_data(tmp_path / "here"), cache_dir=tmp_path / "cache")
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = prepared(model, tmp_path / "there/rows.jsonl", cache_dir=tmp_path / "cache")
    assert there.train.sha256 == here.train.sha256
    assert all(picture.path.is_file() for picture in there.train.sample(1).pictures)


def test_a_token_file_whose_list_of_pictures_is_damaged_is_found(model: Path, tmp_path: Path) -> None:
    (directory,) = prepared(model, make_data(tmp_path)).directories
    blob = directory / "pictures.bin"
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"pictures\.bin has \d+ bytes, expected"):
        TokenSet.open(directory)


def test_pictures_for_a_model_without_eyes_or_for_pretraining_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only sft and lora of a vision-language model") as caught:
        prepared(model, make_data(tmp_path), vision=None)
    assert caught.value.code == "data.images"


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 5))), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    )
)
def test_positions_are_those_of_transformers_for_each_sample_of_a_packed_row(samples: list[list[Any]]) -> None:
    expected, ids, positions, grids = [], [], [], []
    for parts in samples:
        # Text between any two pictures, as every template of such models writes it.
        parts = [item for part in parts for item in (1, part)]
        tokens: list[int] = []
        own = []
        for part in parts:
            tokens += [7] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1])
            own += [] if isinstance(part, int) else [Grid(*part)]
        ids_BT = torch.tensor([tokens])
        grid = torch.tensor([[1, 2 * one.rows, 2 * one.columns] for one in own]) if own else None
        expected.append(JUDGE.get_rope_index(ids_BT, (ids_BT == IMAGE).int(), grid)[0][:, 0])
        ids += tokens
        positions += range(len(tokens))
        grids += own
    found = axes(np.array(ids), np.array(positions), grids, IMAGE)
    assert found.tolist() == torch.cat(expected, dim=1).tolist()


def _judge() -> Any:
    with torch.device("meta"):
        return Qwen2VLModel(AutoConfig.for_model("qwen2_vl", vision_config={"depth": 1}, text_config=SMALL_TEXT))


SMALL_TEXT = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 8}
JUDGE = _judge()


def test_a_model_with_a_tower_comes_back_from_megatron_byte_for_byte(model: Path, tmp_path: Path) -> None:
    ferry.convert(source=model, target=tmp_path / "shards", tp=2, pp=2)
    ferry.convert(source=tmp_path / "shards", target=tmp_path / "back")
    for path in model.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("flat", [False, True])
def test_inspect_knows_the_decoder_and_the_tower(flat: bool, model: Path, tmp_path: Path) -> None:
    directory = as_on_the_hub(model, tmp_path / "hub") if flat else model
    found = ferry.inspect(path=directory)
    assert found["family"] == "qwen2_vl"
    dims = open_checkpoint(directory).model.dims
    assert (dims.num_layers, dims.hidden_size, dims.num_groups, dims.vocab_size) == (2, 64, 2, 263)
