"""Config: where values come from, which one wins, and what is said when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ferry
from ferry.core.arguments import read_arguments
from ferry.core.config import Layer, Resolved, VerbConfig, merge, option, resolve
from ferry.core.errors import ConfigError
from ferry.core.options import options_of
from ferry.core.sources import environment_layer, file_layer, set_layer


class Advanced(VerbConfig):
    """Nested values."""

    depth: int = option(1, help="How deep.")
    word: str = option("x", help="A word.")


class TripConfig(VerbConfig):
    """A config with one field of every kind."""

    kind: Literal["auto", "there", "back"] = option("auto", help="Which way.", positional=True)
    source: Path | None = option(None, help="From.", positional=True, aliases=("--load-dir",), env=("SOURCE_DIR",))
    target: Path | None = option(None, help="To.", positional=True, short="-o")
    tp: int = option(1, ge=1, le=64, help="Ranks.", unit="ranks", aliases=("--tensor-size",), env=("TP",))
    layers: tuple[int, ...] = option((), help="Layers.")
    share: float | None = option(None, help="A share.")
    name: str = option("", help="A name.")
    fast: bool = option(False, help="Hurry.")
    advanced: Advanced = option(Advanced(), help="More.")


OPTIONS = options_of(TripConfig, "trip")


def trip(words: str = "", environ: dict[str, str] | None = None, *files: Path) -> Resolved[TripConfig]:
    arguments = read_arguments(words.split(), OPTIONS)
    layers = [file_layer(file, "trip", OPTIONS, ["pull"]) for file in files]
    layers += [environment_layer("trip", OPTIONS, environ or {}), set_layer(arguments.assignments, OPTIONS)]
    return resolve(TripConfig, [*layers, arguments.layer])


def refusal(words: str = "", environ: dict[str, str] | None = None, *files: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        trip(words, environ, *files)
    return caught.value


def test_flags_win_over_environment_over_later_files_over_earlier_files_over_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("tp: 2\nname: first\nshare: 0.5\nlayers: [1, 2]\n")
    second.write_text("trip:\n  name: second\n  share: 0.25\n")
    config, origins = trip("--tp 8", {"TP": "4", "FERRY_TRIP_SHARE": "0.75"}, first, second)
    assert (config.tp, config.share, config.name, config.layers, config.fast) == (8, 0.75, "second", (1, 2), False)
    assert origins["tp"] == "flag --tp"
    assert origins["share"] == "environment FERRY_TRIP_SHARE"
    assert origins["name"] == f"file {second}"
    assert origins["layers"] == f"file {first}"
    assert origins["fast"] == "default"


def test_the_own_variable_wins_over_the_alias() -> None:
    config, origins = trip("", {"TP": "4", "FERRY_TRIP_TP": "2"})
    assert (config.tp, origins["tp"]) == (2, "environment FERRY_TRIP_TP")


def test_an_empty_variable_counts_as_not_set() -> None:
    assert trip("", {"TP": ""}).origins["tp"] == "default"


def test_places_and_flags_fill_the_same_fields() -> None:
    assert trip("there a b").config == trip("--kind there --load-dir a -o b").config


def test_a_choice_with_a_default_may_be_left_out() -> None:
    config = trip("a b").config
    assert (config.kind, config.source, config.target) == ("auto", Path("a"), Path("b"))


def test_a_value_given_twice_with_different_values_is_refused() -> None:
    assert refusal("there a --source b").code == "config.conflict"
    assert refusal("--tp 2 --tensor-size 4").code == "config.conflict"
    assert trip("--tp 2 --tensor-size 2").config.tp == 2


def test_lists_are_commas_or_repeated_flags() -> None:
    assert trip("--layers 4,4,2").config.layers == trip("--layers 4 --layers 4,2").config.layers == (4, 4, 2)


def test_a_list_in_a_file_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("layers: 4,4\n")
    assert trip("", {}, tmp_path / "a.yaml").config.layers == (4, 4)


def test_set_reaches_nested_values_and_names_their_origin(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("advanced: {depth: 2, word: file}\n")
    config, origins = trip("--set advanced.depth=3 --set tp=2", {}, tmp_path / "a.yaml")
    assert (config.advanced.depth, config.advanced.word, config.tp) == (3, "file", 2)
    assert origins["advanced.depth"] == "flag --set advanced.depth"
    assert origins["advanced.word"].startswith("file ")


def test_booleans_have_a_yes_and_a_no() -> None:
    assert trip("--fast").config.fast
    assert not trip("--no-fast", {"FERRY_TRIP_FAST": "true"}).config.fast


def test_all_wrong_fields_are_named_at_once_each_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("shaer: 1\nshare: much\n")
    error = refusal("thre a b --tpp 3 --tp 0", {"FERRY_TRIP_NAEM": "x"}, tmp_path / "a.yaml")
    assert error.code == "config.invalid"
    for line in (
        "unknown flag --tpp (did you mean '--tp'?)",
        "unknown environment variable FERRY_TRIP_NAEM (did you mean 'FERRY_TRIP_NAME'?)",
        f"unknown key 'shaer' from file {tmp_path}/a.yaml (did you mean 'share'?)",
        f"share=much from file {tmp_path}/a.yaml: expected a number",
        "tp=0 from flag --tp: expected at least 1",
        "kind=thre from argument: expected 'auto', 'there' or 'back' (did you mean 'there'?)",
    ):
        assert f"\n  {line}\n" in f"{error.message}\n"


def test_one_wrong_field_is_one_line() -> None:
    assert refusal("--tp 65").message == "tp=65 from flag --tp: expected at most 64"
    assert refusal("--tp").message == "--tp needs a value"
    assert refusal("there a b c").message == "unexpected argument 'c'"


def test_flags_are_never_abbreviated() -> None:
    assert refusal("--sour a").message == "unknown flag --sour (did you mean '--source'?)"


@pytest.mark.parametrize("text", ["tp: 1\ntp: 2\n", "tp: [1\n", "- tp\n", "trip: {tp: 1}\nunknown: {}\n"])
def test_a_file_that_could_be_misread_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert str(tmp_path / "a.yaml") in refusal("", {}, tmp_path / "a.yaml").message


def test_sections_of_other_verbs_in_a_file_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("trip: {tp: 2}\npull: {source: x}\n")
    assert trip("", {}, tmp_path / "a.yaml").config.tp == 2


def test_a_verb_called_from_python_names_its_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'pth' from argument \(did you mean 'path'\?\)"):
        ferry.inspect(pth="x")  # type: ignore[operator]


def test_the_schema_carries_bounds_units_and_sentences() -> None:
    tp = TripConfig.model_json_schema()["properties"]["tp"]
    assert (tp["minimum"], tp["maximum"], tp["unit"], tp["description"]) == (1, 64, "ranks", "Ranks.")
    json.dumps(TripConfig.model_json_schema())


LAYER_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "a": st.integers(),
        "b": st.none() | st.text(),
        "n": st.fixed_dictionaries({}, optional={"x": st.integers(), "y": st.integers()}),
    },
)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    nested = {f"n.{key}": value for key, value in values.get("n", {}).items()}
    return {key: value for key, value in values.items() if key != "n"} | nested


@settings(deadline=None)  # a busy machine is not a defect
@given(st.lists(LAYER_VALUES, max_size=5))
def test_in_a_merge_the_last_layer_that_has_a_value_wins_and_is_its_origin(many: list[dict[str, Any]]) -> None:
    values, origins = merge(Layer(f"layer {number}", layer) for number, layer in enumerate(many))
    expected: dict[str, tuple[Any, str]] = {}
    for number, layer in enumerate(many):
        expected |= {path: (value, f"layer {number}") for path, value in flat(layer).items()}
    assert flat(values) == {path: value for path, (value, _) in expected.items()}
    if values.get("n") == {}:
        assert origins.pop("n").startswith("layer")
    assert origins == {path: origin for path, (_, origin) in expected.items()}


def test_merging_changes_no_layer() -> None:
    first, second = Layer("first", {"n": {}}), Layer("second", {"n": {"x": 1}})
    assert merge([first, second]) == ({"n": {"x": 1}}, {"n.x": "second"})
    assert first.values == {"n": {}}


@settings(deadline=None)  # a busy machine is not a defect
@given(st.lists(LAYER_VALUES, max_size=4), st.lists(LAYER_VALUES, max_size=4))
def test_merging_in_two_steps_is_merging_in_one(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    def values(layers: list[dict[str, Any]]) -> dict[str, Any]:
        return merge(Layer("x", layer) for layer in layers)[0]

    assert flat(values([values(first), *second])) == flat(values([*first, *second]))


CONFIGS = st.builds(
    TripConfig,
    tp=st.integers(1, 64),
    layers=st.lists(st.integers(0, 99)).map(tuple),
    share=st.none() | st.floats(allow_nan=False),
    name=st.text(),
    fast=st.booleans(),
)


@settings(deadline=None)  # a busy machine is not a defect
@given(CONFIGS)
def test_every_config_can_be_said_as_flags(config: TripConfig) -> None:
    words = [
        f"--tp={config.tp}",
        f"--layers={','.join(map(str, config.layers))}",
        f"--share={config.share}",
        f"--name={config.name}",
        "--fast" if config.fast else "--no-fast",
    ]
    assert resolve(TripConfig, [read_arguments(words, OPTIONS).layer]).config == config
