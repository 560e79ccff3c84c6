"""The options of `ferry serve`: the manual's commands as they are, and an answer to every other option of vLLM."""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from ferry.core.errors import ConfigError
from ferry.core.resolution import Command, understand
from ferry.core.verb import Verb
from ferry.verbs.serve.config import ServeConfig, settings_of

from .headers import model_in

VERB = Verb("serve", "Serve.", "ferry.verbs.serve.config:ServeConfig", "", "")
MANUAL = (
    "--model={model} --max-num-seqs=256 --max-model-len=4096 --max-num-batched-tokens=4096 --dtype=float16 "
    "--tensor-parallel-size=1 --block-size=128 --host=0.0.0.0 --port=8080 --gpu-memory-utilization=0.9 "
    "--trust-remote-code"
)


def understood(words: str, **variables: str) -> Command:
    return understand(VERB, words.split(), variables)


def config_of(words: str, **variables: str) -> ServeConfig:
    config = understood(words, **variables).resolved.config
    assert isinstance(config, ServeConfig)
    return config


def test_the_manuals_command_is_taken_as_it_is(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    config = config_of(MANUAL.format(model=model) + " -q smoothquant")
    assert (config.port, config.host, config.quantization, config.block_size) == (8080, "0.0.0.0", "smoothquant", 128)
    settings = settings_of(config)
    assert (settings.model, settings.dtype, settings.quantization) == (model, "float16", "")
    assert (settings.max_num_seqs, settings.max_model_len, settings.max_num_batched_tokens) == (256, 4096, 4096)
    assert (settings.block_size, settings.gpu_memory_utilization, settings.trust_remote_code) == (128, 0.9, True)


def test_the_manuals_default_port_and_other_spellings() -> None:
    assert config_of("m").port == 8080
    config = config_of("m --served_model_name a --max_model_len 99 -tp 2 --dtype half --kv_cache_memory 1.5GB")
    assert (config.served_model_name, config.max_model_len, config.tensor_parallel_size) == (("a",), 99, 2)
    assert (config.dtype, config.kv_cache_memory) == ("float16", 1_500_000_000)
    assert config_of("m --generation-config vllm").generation_defaults == "none"
    assert not config_of("m --no-enable-prefix-caching").prefix_caching


def test_dash_q_is_the_quantization_here_and_quiet_is_spelled_out() -> None:
    assert "quiet" not in understood("m -q awq").arguments.switches
    assert "quiet" in understood("m -q awq --quiet").arguments.switches


def test_dash_q_before_the_verb_is_still_quiet() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ferry", "-q", "recipes", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_dash_q_is_read_by_the_verb_that_config_show_is_asked_about() -> None:
    words = [sys.executable, "-m", "ferry", "config", "show", "serve", "m", "-q", "w8a8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "w8a8" in done.stdout, done.stdout + done.stderr


def test_a_model_has_the_name_of_its_directory_and_the_path_that_was_given(tmp_path: Path) -> None:
    config = config_of(f"{tmp_path}/llama2-7b")
    assert config.names == ("llama2-7b", f"{tmp_path}/llama2-7b")
    assert config_of("m --served-model-name x,y").names == ("x", "y")
    assert config_of(".").names[0] == Path.cwd().name


def test_the_environment_of_vllm_has_a_variable_of_its_own(tmp_path: Path) -> None:
    assert config_of("m", FERRY_VLLM_ENV=str(tmp_path)).engine_env == tmp_path


def test_words_for_the_engines_own_command_are_split_as_a_shell_does() -> None:
    words = ["m", "--engine-args=--enforce-eager --compilation-config '{\"level\": 3}'"]
    config = understand(VERB, words, {}).resolved.config
    assert isinstance(config, ServeConfig)
    assert settings_of(config).further == ("--enforce-eager", "--compilation-config", '{"level": 3}')
    with pytest.raises(ConfigError, match="as a shell takes them"):
        understand(VERB, ["m", "--engine-args='"], {})


def test_every_option_of_vllm_that_is_not_here_says_what_to_do_instead() -> None:
    table = files("ferry.verbs.serve").joinpath("vllm_options.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        with pytest.raises(ConfigError) as caught:
            understood(f"m {row['option']} 4")
        assert row["instead"] in caught.value.message
        assert row["instead"]


def test_an_advice_is_found_for_underscores_and_negated_switches_too() -> None:
    with pytest.raises(ConfigError, match="what does not fit is computed again"):
        understood("m --swap_space 4")
    with pytest.raises(ConfigError, match="read in parts"):
        understood("m --no-enable-chunked-prefill")


@pytest.mark.parametrize("size", ["2 apples", "GB", "-2GB", "1.5.2MB"])
def test_a_size_that_is_none_is_refused_with_an_example(size: str) -> None:
    with pytest.raises(ConfigError, match="2GB"):
        understand(VERB, ["m", f"--kv-cache-memory={size}"], {})


def test_a_float_model_is_rounded_when_loaded_and_a_quantized_one_is_not_rounded_again(tmp_path: Path) -> None:
    plain = model_in(tmp_path / "plain")
    held = model_in(tmp_path / "held", quantization_config={"quant_method": "compressed-tensors"})
    assert settings_of(config_of(f"{plain} -q w8a8")).quantization == "w8a8"
    assert settings_of(config_of(f"{held} -q w8a8")).quantization == ""


def test_help_imports_neither_numpy_nor_a_framework_nor_a_server() -> None:
    code = "import sys; from ferry.cli import main; main(['serve', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--gpu-memory-utilization" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"numpy", "torch", "transformers", "fastapi", "httpx", "llguidance"}
