"""Build script: the compiled kernels, which are optional; everything else is in pyproject.toml.

``CET_BUILD_CPP=1`` makes a failing build of the kernels an error, ``CET_BUILD_CPP=0`` leaves them out. When it is unset
they are built if a compiler works.
"""

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

KERNELS = [f"csrc/cpu/{name}.cpp" for name in ("kernels", "exit_gate", "compact", "consistent_exit_loss")]
# One build serves every processor: the instructions are chosen when the program runs.
CAPABILITIES = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = [*CAPABILITIES["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Contraction to fused multiply-adds is what GCC does by default and Clang does not. GCC 12 warns of its own intrinsics.
FLAGS = ["-std=gnu++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class BuildKernels(build_ext):
    """Compiles the kernels once per capability."""

    def build_extension(self, ext):
        ext.extra_objects = [
            kernel
            for capability, flags in CAPABILITIES.items()
            for kernel in self.compiler.compile(
                KERNELS,
                output_dir=str(Path(self.build_temp, capability)),
                macros=[("CET_CAPABILITY", capability)],
                depends=ext.depends,
                extra_postargs=[*FLAGS, *flags],
            )
        ]
        super().build_extension(ext)


wanted = os.environ.get("CET_BUILD_CPP", "")
if wanted not in ("", "0", "1"):
    raise SystemExit(f"CET_BUILD_CPP is {wanted!r}; set it to 0 or 1, or leave it unset")

extension = Pybind11Extension(
    "cet._C",
    ["csrc/bindings.cpp", "csrc/cpu/parallel.cpp"],
    depends=[*KERNELS, *(str(path) for path in sorted(Path("csrc").rglob("*.h")))],
    extra_compile_args=FLAGS,
    cxx_std=17,
    optional=wanted != "1",
)

setup(
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"cet": ["py.typed"]},
    ext_modules=[] if wanted == "0" else [extension],
    cmdclass={"build_ext": BuildKernels},
)
