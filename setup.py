"""The compiled part: the kernels of the native engine, once for each instruction set. The rest is in pyproject.toml.

They are optional: where there is no compiler, installing goes on without them, and torch computes.
"""

from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("src/ferry/engines/native/kernels")
# Products and sums are fused only where the source says so: the same row gives the same bits wherever it is computed.
EXACT = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-psabi"]
INSTRUCTION_SETS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "plain": []}

setup(
    ext_modules=[
        Extension(
            f"ferry.engines.native._kernels_{name}",
            sources=[str(KERNELS / f"{name}.cpp")],
            depends=[str(path) for path in sorted(KERNELS.glob("*.h"))],
            extra_compile_args=[*EXACT, *flags],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]
)
