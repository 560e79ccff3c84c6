"""A quantized model, loaded and run by vLLM itself in an environment of its own (3.5 GB, kept in bench-work)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import ferry
from surroundings import REPOSITORY, without_hub
from vllm_cpu import vllm_cpu

ASK = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    # Not float32: on CPUs with AMX vLLM's int8 kernel takes bfloat16 or half only.
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=512, seed=0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    found = {"text": answer.outputs[0].text, "quantization": llm.llm_engine.model_config.quantization}
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    return vllm_cpu(REPOSITORY / "bench-work/quantize/envs/vllm-cpu")


def ask(vllm_python: Path, model: Path, work: Path) -> dict[str, str]:
    """Ask for the capital of France, greedily; return what vLLM said and what it took the model for."""
    (work / "ask.py").write_text(ASK, encoding="utf-8")
    environment = without_hub(os.environ) | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(vllm_python), str(work / "ask.py"), str(model), str(work / "answer.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return json.loads((work / "answer.json").read_text(encoding="utf-8"))


def test_vllm_runs_a_w8a8_model_as_it_is_and_knows_the_capital_of_france(
    vllm_python: Path, smollm2: Path, tmp_path: Path
) -> None:
    ferry.quantize(model=smollm2, method="smoothquant", output=tmp_path / "w8a8")
    answer = ask(vllm_python, tmp_path / "w8a8", tmp_path)
    assert answer["quantization"] == "compressed-tensors"
    assert "Paris" in answer["text"]
