"""Build script: the compiled kernels, which are optional; everything else is in pyproject.toml.

``CET_BUILD_CPP=1`` makes a failing build of the CPU kernels an error, ``CET_BUILD_CPP=0`` leaves them out. When it is
unset they are built if a compiler works. ``CET_BUILD_CUDA`` is the same for the CUDA part and nvcc; no GPU is needed.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.modified import newer_group
except ImportError:  # before 69.0

    def newer_group(sources, target):
        return not os.path.exists(target) or any(os.path.getmtime(s) > os.path.getmtime(target) for s in sources)


HOST = ["csrc/bindings.cpp", "csrc/cpu/parallel.cpp"]
KERNELS = sorted({str(path) for path in Path("csrc/cpu").glob("*.cpp")} - {*HOST})
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h*"))
# One build serves every processor: the instructions are chosen when the program runs.
CAPABILITIES = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = [*CAPABILITIES["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Contraction to fused multiply-adds is what GCC does by default and Clang does not. GCC 12 warns of its own intrinsics.
FLAGS = ["-std=gnu++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS += ["-Werror=missing-field-initializers"]  # a kernel that is missing in the table of a capability


CUDA_SOURCES = [f"csrc/cuda/{name}" for name in ("bindings.cpp", "switch_graph.cu")]
CUDA_ARCHITECTURES = (80, 90, 100)


def cuda_targets(nvcc):
    """nvcc's options for those of the architectures that it knows, and for PTX, which newer devices compile."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if listed.returncode != 0:
        raise CompileError(f"{nvcc} --list-gpu-arch failed: {(listed.stderr or listed.stdout).strip()}")
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed.stdout)}
    targets = [number for number in CUDA_ARCHITECTURES if number in known]
    if not targets:
        raise CompileError(f"{nvcc} compiles for none of sm_80, sm_90 and sm_100; install CUDA 12 or newer")
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    return [*options, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


class BuildKernels(build_ext):
    """Compiles the CPU kernels once per capability, and the CUDA part with nvcc."""

    def build_extension(self, ext):
        path = self.get_ext_fullpath(ext.name)
        if not (self.force or newer_group([*ext.sources, *ext.depends, "setup.py"], path)):
            return
        if ext.name == "cet._cuda":
            self.build_cuda(ext)
            return
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

    def build_cuda(self, ext):
        nvcc = shutil.which("nvcc")
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
        host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-shared"]
        command = [nvcc, "-std=c++17", "-O3", *cuda_targets(nvcc), *includes, *host, *ext.sources, "-o", str(path)]
        print(*command)
        if subprocess.run(command).returncode != 0:
            raise CompileError("nvcc failed; its messages are above")


def wanted(variable):
    """``"1"``, ``"0"``, or ``""`` for a part that is left out where it cannot be built."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} is {value!r}; set it to 0 or 1, or leave it unset")
    return value


cpp, cuda = wanted("CET_BUILD_CPP"), wanted("CET_BUILD_CUDA")
if cuda == "1" and shutil.which("nvcc") is None:
    raise SystemExit("nvcc is not on the PATH; install the CUDA toolkit, or leave CET_BUILD_CUDA unset")
extensions = []
if cpp != "0":
    extensions.append(
        Pybind11Extension(
            "cet._C",
            HOST,
            depends=[*KERNELS, *HEADERS],
            extra_compile_args=FLAGS,
            cxx_std=17,
            optional=cpp != "1",
        )
    )
if cuda == "1" or (cuda == "" and shutil.which("nvcc")):
    extensions.append(Extension("cet._cuda", CUDA_SOURCES, depends=HEADERS, optional=cuda != "1"))

setup(
    package_dir={"": "src", "cet.kernels": "kernels"},
    packages=[*find_packages("src"), "cet.kernels"],
    package_data={"cet": ["py.typed", "*.pyi"], "cet.energy": ["*.pyi"], "cet.training": ["*.pyi"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
)
