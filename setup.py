"""Builds icrl_kernels._C: C++ for the CPU in three instruction sets, CUDA C++ where nvcc is found. Needs no torch.

ICRL_CUDA=0 leaves CUDA out, ICRL_CUDA=1 fails without an nvcc that serves, unset or "auto" takes it where there is one.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
INSTRUCTION_SETS = {  # the longest compiles first
    "avx512": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes
    ],
    # -Wno-psabi: vectors wider than the registers are passed to inlined functions only
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi"],
    "generic": ["-Wno-psabi"],
}
# The simulator's numbers are the same bits on every processor, GPUs included: no contraction into fused multiply-adds.
SAME_BITS, SAME_BITS_CUDA = ["-ffp-contract=off"], ["-fmad=false"]

# Every source with the flags that only it has. An x.isa.cpp is compiled once for each instruction set, with ICRL_ISA as
# its namespace; an x.cu only where nvcc is. Compiles start in this order: the longest come first, so that at the end no
# core waits for one of them.
SOURCES: dict[str, list[str]] = {
    "tabular/value_iteration.cu": [],
    "linear_attention/gated_delta_rule.isa.cpp": [],
    "linear_attention/gla.isa.cpp": [],
    "linear_attention/gsa.isa.cpp": [],
    "tabular/value_iteration.isa.cpp": [],
    "linear_attention/rwkv7.isa.cpp": [],
    "fused/mixers.isa.cpp": [],
    "fused/layers.isa.cpp": [],
    "fused/tokens.isa.cpp": [],
    "fused/memories.isa.cpp": [],
    "tabular/rollout.cu": SAME_BITS_CUDA,
    "tabular/value_iteration_cuda_on_host.cpp": [],
    "tabular/anymdp.isa.cpp": [],
    "tabular/rollout.isa.cpp": SAME_BITS,
    "fused/closed_loop.cpp": SAME_BITS,
    "fused/program.cpp": [],
    "linear_attention/gated_delta_rule.cpp": [],
    "linear_attention/gla.cpp": [],
    "linear_attention/gsa.cpp": [],
    "linear_attention/rwkv7.cpp": [],
    "tabular/anymdp.cpp": [],
    "tabular/emission.cpp": [],
    "tabular/model_based.cpp": SAME_BITS,
    "tabular/rollout.cpp": SAME_BITS,
    "tabular/rollout_tables.cpp": SAME_BITS,
    "tabular/value_iteration.cpp": [],
    "module.cpp": [],
    "common/step_call.cpp": [],
    "common/isa.cpp": [],
    "common/parallel.cpp": [],
}


CUDA_LIBRARIES = ["cudart_static", "rt", "dl", "pthread"]


def find_nvcc(compiler: list[str]) -> str | None:
    """nvcc, where it is wanted, found, and compiles and links with these flags and this C++ compiler.

    Where ICRL_CUDA=1 wants one that cannot serve, the build ends in one line that says why; otherwise it goes on without
    CUDA, and says so.
    """
    wanted = os.environ.get("ICRL_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"ICRL_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("ICRL_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
        return None
    why = refusal(nvcc, compiler)
    if why and wanted == "1":
        raise SystemExit(f"ICRL_CUDA=1, but {nvcc} cannot build the kernels: {why}")
    if why:
        print(f"icrl_kernels is built without CUDA: {nvcc} cannot build the kernels: {why}", file=sys.stderr)
    return None if why else nvcc


def refusal(nvcc: str, compiler: list[str]) -> str:
    """Why an empty file cannot be compiled and linked as the kernels are; nothing where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source, obj, library = (os.path.join(folder, name) for name in ("empty.cu", "empty.o", "empty.so"))
        open(source, "w").close()
        try:
            for line in ([nvcc, "-c", source, "-o", obj, *NVCC_FLAGS], [*compiler, "-shared", obj, "-o", library]):
                if line[0] != nvcc:
                    line += [f"-L{x}" for x in cuda_library_dirs(nvcc)] + [f"-l{x}" for x in CUDA_LIBRARIES]
                run = subprocess.run(line, capture_output=True, text=True, errors="replace")
                if run.returncode:
                    said = [x.strip() for x in (run.stderr + run.stdout).splitlines() if x.strip()]
                    reasons = [x for x in said if re.search(r"error|fatal|cannot|unsupported", x, re.I)] or said
                    return reasons[0] if reasons else f"{line[0]} ends with {run.returncode}"
        except OSError as error:
            return f"it does not start: {error}"
    return ""


def cuda_library_dirs(nvcc: str) -> list[str]:
    # nvcc on PATH may be a wrapper script, so its own folder says nothing: ask it.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    line = next((x for x in dry.stderr.splitlines() if "LIBRARIES=" in x), "")
    return re.findall(r'-L([^"\s]+)', line)


def check_machine(compiler: list[str]) -> str:
    """The compiler's version; ends the build in one line where the kernels cannot be compiled."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        raise SystemExit(f"icrl_kernels is for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    try:
        run = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"icrl_kernels needs g++, but {compiler[0]} does not start: {error}") from None
    version = dict(re.findall(r'^#define (\w+) "?([^"\n]*)', run.stdout, re.M))
    if "__clang__" in version or int(version.get("__GNUC__", 0)) < 12:
        found = version.get("__VERSION__", "no C++ compiler")
        raise SystemExit(f"icrl_kernels needs g++ 12 or newer, but {compiler[0]} is {found} (CXX chooses another)")
    return version["__VERSION__"]


def compiles(nvcc: str | None) -> dict[str, tuple[str, list[str]]]:
    """Object: (source, the flags that only it has), in the order in which they are to start."""
    found = {os.path.relpath(x, "csrc") for end in ("cpp", "cu") for x in glob(f"csrc/**/*.{end}", recursive=True)}
    if found != SOURCES.keys():
        raise SystemExit(f"SOURCES in setup.py or csrc/ lacks {', '.join(sorted(found ^ SOURCES.keys()))}")
    out = {}
    for name, flags in SOURCES.items():
        stem, source = name.removesuffix(".cpp"), f"csrc/{name}"
        if name.endswith(".isa.cpp"):
            for isa, isa_flags in INSTRUCTION_SETS.items():
                out[f"csrc/{stem}.{isa}.o"] = (source, [f"-DICRL_ISA={isa}", *isa_flags, *flags])
        elif nvcc or not name.endswith(".cu"):
            out[f"csrc/{stem}.o"] = (source, flags)
    return out


def read_by(source: str, found: set[str]) -> set[str]:
    """A source and all that it includes of ours, however deep."""
    if source not in found and os.path.exists(source):
        found.add(source)
        with open(source) as f:
            for name in re.findall(r'^#include "([^"]+)"', f.read(), re.M):
                read_by(f"csrc/{name}", found)
    return found


def up_to_date(obj: str, source: str, command: str) -> bool:
    """Whether an object was made by this command of what there is now: a build in place compiles only what it must."""
    if not (os.path.exists(obj) and os.path.exists(f"{obj}.cmd")):
        return False
    with open(f"{obj}.cmd") as f:
        same = f.read() == command
    return same and os.path.getmtime(obj) >= max(map(os.path.getmtime, read_by(source, set())))


class Build(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # what has changed is for up_to_date to say; linking takes a second

    def build_extensions(self) -> None:
        compiler = self.compiler
        compile_all, compile_cpp = compiler.compile, compiler._compile
        cxx = getattr(compiler, "compiler_so_cxx", compiler.compiler_so)
        version = check_machine(cxx)
        nvcc = find_nvcc(cxx)
        todo = compiles(nvcc)
        if nvcc:
            for extension in self.extensions:
                extension.define_macros.append(("ICRL_WITH_CUDA", "1"))
                extension.library_dirs += cuda_library_dirs(nvcc)
                extension.libraries += CUDA_LIBRARIES

        def object_filenames(sources, strip_dir=0, output_dir=""):
            return [os.path.join(output_dir, obj) for obj in todo]

        def compile_sources(sources, **options):
            return compile_all([source for source, _ in todo.values()], **options)

        def compile_one(obj, src, ext, cc_args, extra, pp_opts):
            own = todo[os.path.relpath(obj, self.build_temp)][1]
            if ext == ".cu":
                start, flags = [nvcc, "-c", src, "-o", obj], [*NVCC_FLAGS, *own, *pp_opts]
            else:
                start, flags = [*cxx, *cc_args, src], [*extra, *own, *pp_opts]
            # -I names folders of the environment, which pip makes anew for each build
            whole = [x for x in (*start, *flags) if not x.startswith("-I")]
            command = shlex.join([*whole, f"g++ {version}", f"pybind11 {pybind11.__version__}"])
            if up_to_date(obj, src, command):
                return
            if os.path.exists(f"{obj}.cmd"):
                os.remove(f"{obj}.cmd")  # until it is made again: an interrupted compile leaves half an object
            if ext == ".cu":
                self.spawn([*start, *flags])
            else:
                compile_cpp(obj, src, ext, cc_args, [*extra, *own], pp_opts)
            with open(f"{obj}.cmd", "w") as f:
                f.write(command)

        compiler.src_extensions.append(".cu")
        compiler.object_filenames, compiler.compile, compiler._compile = object_filenames, compile_sources, compile_one
        super().build_extensions()


extension = Pybind11Extension(
    "icrl_kernels._C",
    sorted(f"csrc/{name}" for name in SOURCES),
    depends=[*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.inl", recursive=True)],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=CXX_FLAGS,
    libraries=["dl", "pthread"],
)

with ParallelCompile(default=0):
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})
