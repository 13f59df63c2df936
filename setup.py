"""Builds icrl_kernels._C: C++ for the CPU in three instruction sets, CUDA C++ where nvcc is found. Needs no torch.

ICRL_CUDA=0 leaves CUDA out, ICRL_CUDA=1 fails without nvcc, unset or "auto" takes it where it is.
"""

import os
import re
import shutil
import subprocess
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ISA_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
# The simulator's numbers are the same bits on every processor, GPUs included: no contraction into fused multiply-adds.
SAME_BITS = {
    ("rollout", ".cpp"): ["-ffp-contract=off"],
    ("model_based", ".cpp"): ["-ffp-contract=off"],
    ("rollout", ".cu"): ["-fmad=false"],
}
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def find_nvcc() -> str | None:
    wanted = os.environ.get("ICRL_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"ICRL_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None and wanted == "1":
        raise SystemExit("ICRL_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
    return nvcc


def cuda_library_dirs(nvcc: str) -> list[str]:
    # nvcc on PATH may be a wrapper script, so its own folder says nothing: ask it.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    line = next((x for x in dry.stderr.splitlines() if "LIBRARIES=" in x), "")
    return re.findall(r'-L([^"\s]+)', line)


NVCC = find_nvcc()


class Build(build_ext):
    def build_extensions(self) -> None:
        compiler, compile_cpp = self.compiler, self.compiler._compile
        compiler.src_extensions.append(".cu")
        name_objects = compiler.object_filenames

        def object_filenames(sources, strip_dir=0, output_dir=""):
            # x.cpp and x.cu must not share x.o
            return [
                n[: -len(".o")] + ".cu.o" if s.endswith(".cu") else n
                for s in sources
                for n in name_objects([s], strip_dir, output_dir)
            ]

        def compile_one(obj, src, ext, cc_args, extra, pp_opts):
            name = os.path.basename(src)
            own = next(
                (f for (start, end), f in SAME_BITS.items() if name.startswith(start) and name.endswith(end)), []
            )
            if ext == ".cu":
                return self.spawn([NVCC, "-c", src, "-o", obj, *NVCC_FLAGS, *own, *pp_opts])
            isa = next((flags for end, flags in ISA_FLAGS.items() if src.endswith(end)), [])
            return compile_cpp(obj, src, ext, cc_args, [*extra, *isa, *own], pp_opts)

        compiler.object_filenames, compiler._compile = object_filenames, compile_one
        super().build_extensions()


extension = Pybind11Extension(
    "icrl_kernels._C",
    sorted([*glob("csrc/**/*.cpp", recursive=True), *(glob("csrc/cuda/*.cu") if NVCC else [])]),
    depends=[*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.inl", recursive=True)],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall"],
    libraries=["dl", "pthread"],
)
if NVCC:
    extension.define_macros.append(("ICRL_WITH_CUDA", "1"))
    extension.library_dirs += cuda_library_dirs(NVCC)
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


def read_by(source: str, found: set[str]) -> set[str]:
    """A source and all that it includes of ours, however deep."""
    if source not in found and os.path.exists(source):
        found.add(source)
        with open(source) as f:
            for name in re.findall(r'^#include "([^"]+)"', f.read(), re.M):
                read_by(f"csrc/{name}", found)
    return found


def changed(obj: str, src: str) -> bool:
    """Whether an object is older than anything it is made of: a rebuild in place compiles only what it must."""
    return not os.path.exists(obj) or os.path.getmtime(obj) < max(map(os.path.getmtime, read_by(src, set())))


with ParallelCompile(default=0, needs_recompile=changed):
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})
