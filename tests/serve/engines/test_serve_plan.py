"""What `ferry serve` refuses before it starts anything, and what it says it would do."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ferry.core.config import Layer, resolve
from ferry.core.errors import ConfigError, FerryError, InputError, LayoutError
from ferry.engines.engine import EngineSettings
from ferry.engines.hardware import Place, ascend, free_memory_bytes, nvidia, total_memory_bytes
from ferry.engines.model_facts import read_facts
from ferry.engines.preflight import Memory, check_model, plan_memory
from ferry.verbs.serve.config import ServeConfig
from ferry.verbs.serve.plan import check_port, check_quantization, plan, prepare, read_keys, trusted_hosts

from .headers import model_in, seven_b

GIB = 1 << 30
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized",
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }},
    "ignore": ["lm_head"],
}  # fmt: skip


def config(model: Path, **fields: Any) -> ServeConfig:
    return resolve(ServeConfig, [Layer("argument", {"model": model, **fields})]).config


def refused(kind: type[FerryError], code: str, model: Path, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        plan(config(model, port=0, **fields))
    assert caught.value.code == code
    assert caught.value.repair
    return str(caught.value)


def laptop(total_gib: float, free_gib: float, share: float | None = None) -> Place:
    return Place("this machine", int(total_gib * GIB), int(free_gib * GIB), share, 400_000_000)


def memory(model: Path, place: Place, dtype: str = "float32", **settings: Any) -> Memory:
    return plan_memory(read_facts(model), EngineSettings(model, **settings), place, dtype)


def test_the_plan_says_engine_and_why_and_what_fits(tmp_path: Path) -> None:
    made = plan(config(model_in(tmp_path / "model"), port=0))
    assert made.details["engine"] == "native"
    assert set(made.details["candidates"]) == {"native", "vllm", "vllm-ascend", "llamacpp"}
    text = "\n".join(made.choices)
    assert "engine: native, because" in text
    assert "not vllm-ascend:" in text
    assert "not llamacpp: it reads .gguf files only" in text
    assert "max_model_len: 2048 tokens (max_position_embeddings in config.json)" in text
    assert made.details["cache_tokens"] >= 2048


def test_a_length_above_the_models_names_the_limit_and_where_it_is_from(tmp_path: Path) -> None:
    said = refused(ConfigError, "serve.max-model-len", model_in(tmp_path / "model"), max_model_len=4096)
    assert "2048 tokens (max_position_embeddings in config.json" in said
    assert "--max-model-len 2048" in said


def test_the_key_of_the_manuals_chatglm_is_named(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model", max_position_embeddings=None, seq_length=8192)
    facts = read_facts(model)
    assert (facts.max_positions, facts.max_positions_from) == (8192, "seq_length in config.json")


def test_rope_scaling_of_llama_3_1_is_understood_and_does_not_stretch_its_length(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model", rope_scaling=LLAMA3, max_position_embeddings=131072)
    facts = read_facts(model)
    assert facts.max_positions == 131072
    check_model(facts, EngineSettings(model, max_model_len=131072))


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "default", "rope_theta": 10000.0}, 2048),
    ],
)
def test_rope_scaling_stretches_the_longest_text(tmp_path: Path, rope: dict[str, Any], length: int) -> None:
    model = model_in(tmp_path / "model", rope_parameters=rope)
    assert read_facts(model).max_positions == length
    check_model(read_facts(model), EngineSettings(model, max_model_len=length))


def test_an_unknown_rope_scaling_is_refused_by_name(tmp_path: Path) -> None:
    said = refused(InputError, "serve.rope", model_in(tmp_path / "m", rope_scaling={"type": "lama3", "factor": 8.0}))
    assert "'lama3'" in said
    assert "did you mean 'llama3'" in said


def test_a_rope_scaling_without_its_type_or_its_numbers_is_refused(tmp_path: Path) -> None:
    refused(InputError, "serve.rope", model_in(tmp_path / "a", rope_scaling={"factor": 8.0}))
    said = refused(InputError, "serve.rope", model_in(tmp_path / "b", rope_scaling={"type": "llama3", "factor": 8.0}))
    assert "low_freq_factor, high_freq_factor" in said


def test_weights_that_do_not_fit_say_what_would(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        memory(seven_b(tmp_path / "7b"), laptop(16, 12))
    assert "26.95 GB in float32" in caught.value.message
    assert "-q w8a8" in caught.value.repair
    assert memory(seven_b(tmp_path / "7b"), laptop(16, 12), quantization="w8a8").weights_bytes < 8 * GIB


def test_a_cache_that_is_too_small_says_to_which_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        memory(seven_b(tmp_path / "7b"), laptop(32, 16), "bfloat16", max_model_len=4096, kv_cache_memory_bytes=GIB)
    assert "--max-model-len 2048 or less" in caught.value.repair
    assert "--kv-cache-memory 2148MB" in caught.value.repair


def test_a_length_nobody_asked_for_is_lowered_and_said(tmp_path: Path) -> None:
    found = memory(seven_b(tmp_path / "7b"), laptop(32, 14), "bfloat16")
    assert found.is_lower
    assert found.max_model_len < 4096
    assert "the model's own limit is 4096" in found.notes[0]


def test_a_share_of_an_accelerator_that_is_not_free_says_which_would_be(tmp_path: Path) -> None:
    gpu = Place("the NVIDIA GPU", 24 * GIB, 20 * GIB, 0.9, 2 * GIB, on_cpu=False)
    with pytest.raises(ConfigError) as caught:
        memory(seven_b(tmp_path / "7b"), gpu, "bfloat16")
    assert "--gpu-memory-utilization 0.83 or less" in caught.value.repair
    found = memory(seven_b(tmp_path / "7b"), gpu, "bfloat16", gpu_memory_utilization=0.8)
    assert found.total_bytes == int(0.8 * 24 * GIB)


def test_a_share_too_small_for_the_weights_says_the_least_one(tmp_path: Path) -> None:
    gpu = Place("the NVIDIA GPU", 24 * GIB, 24 * GIB, 0.9, 2 * GIB, on_cpu=False)
    with pytest.raises(ConfigError) as caught:
        memory(seven_b(tmp_path / "7b"), gpu, "bfloat16", gpu_memory_utilization=0.5)
    assert "--gpu-memory-utilization 0.62 or more" in caught.value.repair


def test_the_manuals_share_on_a_busy_laptop_becomes_what_is_free(tmp_path: Path) -> None:
    found = memory(model_in(tmp_path / "model"), laptop(32, 10), gpu_memory_utilization=0.9)
    assert found.total_bytes <= 10 * GIB
    assert "more than the" in found.notes[0]


def test_ranks_share_weights_and_must_divide_the_heads(tmp_path: Path) -> None:
    model = seven_b(tmp_path / "7b")
    one, two = (memory(model, laptop(64, 60), "bfloat16", tensor_parallel_size=ranks) for ranks in (1, 2))
    assert two.weights_bytes == one.weights_bytes // 2
    with pytest.raises(LayoutError, match="use 1, 2, 4, 8, 16, 32"):
        check_model(read_facts(model), EngineSettings(model, tensor_parallel_size=3))


@pytest.mark.parametrize(
    ("wanted", "held", "said"),
    [
        ("smoothquant", None, "`ferry quantize"),
        ("smoothquant", None, "-q w8a8 rounds it"),
        ("awq", None, "--method awq"),
        ("ascend", None, "--format ascend"),
        ("none", W8A8, "--dequantize"),
        ("awq", W8A8, "is compressed-tensors W8A8"),
    ],
)
def test_a_quantization_that_the_model_does_not_have_is_refused(
    tmp_path: Path, wanted: str, held: dict[str, Any] | None, said: str
) -> None:
    model = model_in(tmp_path / "model", **({"quantization_config": held} if held else {}))
    assert said in refused(ConfigError, "serve.quantization", model, quantization=wanted)


@pytest.mark.parametrize("wanted", ["auto", "w8a8", "smoothquant", "compressed-tensors"])
def test_a_quantization_that_the_model_has_is_taken(tmp_path: Path, wanted: str) -> None:
    model = model_in(tmp_path / "model", quantization_config=W8A8)
    check_quantization(config(model, quantization=wanted), read_facts(model))


def test_ranks_on_an_engine_that_has_none_are_refused(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    said = refused(ConfigError, "engine.option", model, tensor_parallel_size=2, engine="native")
    assert "--tensor-parallel-size" in said


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use; .*--port 0"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match="no address of this machine"):
        check_port("192.0.2.1", 0)


def test_a_model_that_is_not_there_is_said_before_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError) as caught:
            plan(config(tmp_path / "nothing", port=taken.getsockname()[1]))
    assert caught.value.code == "input.missing"


def test_a_key_file_must_be_readable_and_hold_keys(tmp_path: Path) -> None:
    model, keys = model_in(tmp_path / "model"), tmp_path / "keys"
    refused(InputError, "serve.keys", model, api_key_file=keys)
    keys.write_text("\n# mine\n")
    refused(InputError, "serve.keys", model, api_key_file=keys)
    keys.write_text("a b\n")
    refused(InputError, "serve.keys", model, api_key_file=keys)
    keys.write_text("# mine\nsecret-1\n\nsecret-2\n")
    assert read_keys(keys) == ("secret-1", "secret-2")
    keys.chmod(0o644)
    assert "chmod 600" in "\n".join(prepare(config(model, api_key_file=keys)).notes)


def test_an_open_door_without_a_key_is_said(tmp_path: Path) -> None:
    assert "without a key" in "\n".join(prepare(config(model_in(tmp_path / "model"), host="0.0.0.0")).notes)


def test_only_a_server_of_this_machine_without_keys_looks_at_who_asks(tmp_path: Path) -> None:
    assert trusted_hosts(config(tmp_path)) == ("localhost", "127.0.0.1", "::1")
    assert "127.0.0.2" in trusted_hosts(config(tmp_path, host="127.0.0.2"))
    assert trusted_hosts(config(tmp_path, host="0.0.0.0")) == ()
    assert trusted_hosts(config(tmp_path, api_key_file=tmp_path / "keys")) == ()


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "ferry pull" in refused(InputError, "input.missing", tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    refused(InputError, "hf.no-weights", tmp_path)


def test_accelerators_are_seen_by_the_files_of_their_drivers(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "davinci0", "davinci_manager"):
        (tmp_path / name).touch()
    assert (nvidia(tmp_path).num_devices, ascend(tmp_path).num_devices) == (2, 1)
    assert nvidia(tmp_path / "none").num_devices == 0


def test_memory_is_that_of_the_smallest_container_around(tmp_path: Path) -> None:
    for name, text in {
        "proc/meminfo": "MemAvailable: 4000000 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "1000000\n",
        "sys/fs/cgroup/a/memory.current": "300000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "100\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory_bytes(tmp_path) == 700_000
    assert total_memory_bytes(tmp_path) == 1_000_000


def test_weights_of_4_bits_are_counted_as_floats_where_they_become_floats(tmp_path: Path) -> None:
    directory = model_in(tmp_path / "awq", values=1000)
    facts = replace(read_facts(directory), scheme="W4A16", format="awq", integer_bytes=10_000)
    settings = EngineSettings(directory)
    unpacked = plan_memory(facts, settings, laptop(16, 12), "float32")
    kept = plan_memory(facts, settings, laptop(16, 12)._replace(unpacks=False), "float32")
    assert (unpacked.weights_bytes, kept.weights_bytes) == (4 * 21_000, 4 * 1000 + 10_000)
