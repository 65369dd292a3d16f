"""Build of the compiled parts. Everything declarative is in pyproject.toml.

CONTRASTIVE_OPS_BUILD chooses: "auto" compiles what this machine can and torch can use, and installs as pure Python
otherwise, "python" compiles nothing, "cpp" the C++ engine, "cuda" the CUDA kernels, too; the last two compile or fail.
CUDA_HOME or CUDA_PATH name the CUDA toolkit, TORCH_CUDA_ARCH_LIST the architectures, else those of the GPUs here, or of
most where there is none. MAX_JOBS bounds the parallel compilations.
"""

import functools
import hashlib
import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import setup
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError
from setuptools.modified import newer_group

MODES = ("auto", "python", "cpp", "cuda")
MODE = os.environ.get("CONTRASTIVE_OPS_BUILD", "auto")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# csrc/cpu/tile.cpp is compiled once for each; which one runs is decided when the process starts
INSTRUCTION_SETS = {"DEFAULT": []}
MATRIX_UNIT = []  # csrc/cpu/matrix_unit.cpp is compiled with these, where the compiler knows them
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    INSTRUCTION_SETS.update(AVX2=avx2, AVX512=avx512)
    MATRIX_UNIT = [*avx512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
APART = ("tile.cpp", "matrix_unit.cpp")
WITH_MATRIX_UNIT = "-DCONTRASTIVE_OPS_MATRIX_UNIT"

HOMES = (Path("/usr/local/cuda"),)  # of CUDA toolkits, where neither the environment nor PATH name one
CUDA_NAME = "contrastive_ops._cuda"  # a library for torch.ops.load_library, not a Python module
# sm_80 code runs on 8.x, and PTX of it on what comes later; code of 9.0a and 10.0a nowhere else
CUDA_ARCHITECTURES = "8.0+PTX;9.0a;10.0a"
SPECIFIC = (9, 10)  # majors whose GPUs take such code
# debug information is 29 of 30 MB, and Python's own flags ask for it
NO_DEBUG, STRIPPED = "-g0", "-Wl,--strip-all"


class SourceDistribution(sdist):
    """With the sources of what is compiled, also when it is made where nothing can be compiled."""

    def make_release_tree(self, base_dir, files):
        sources = (path for folder in ("csrc", "kernels", "tests", "bench") for path in Path(folder).rglob("*"))
        more = {str(path) for path in sources if path.is_file() and "__pycache__" not in path.parts}
        super().make_release_tree(base_dir, [*files, *sorted(more.difference(files))])


def say(text: str) -> None:
    """pip hides standard output; this reaches the log of `pip -v` and of a failed build."""
    print(f"contrastive_ops: {text}", file=sys.stderr)


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class Toolkit(NamedTuple):
    """A CUDA toolkit, as its nvcc describes it."""

    nvcc: str
    version: str
    codes: list[str]  # sm_80 and so on
    include_dirs: list[str]
    library_dirs: list[str]


def find_nvcc() -> str:
    """That of the toolkit which the environment names, or the first one there is."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            nvcc = shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin"))
            if nvcc is None:
                raise RuntimeError(f"{variable} is {os.environ[variable]}, where there is no bin/nvcc")
            return nvcc
    wheels = importlib.util.find_spec("nvidia")
    homes = list(HOMES)
    for folder in wheels.submodule_search_locations if wheels else ():
        homes += sorted(Path(folder).glob("cu*"), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(home / "bin") for home in homes)])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        raise RuntimeError("no nvcc in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and the nvidia packages of pip")
    return nvcc


@functools.cache
def toolkit() -> Toolkit:
    nvcc = find_nvcc()

    def ask(*arguments):
        result = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{nvcc} does not work: {result.stdout.strip()}")
        return result.stdout

    # where nvcc is says little of the toolkit: it may be a script that calls another one
    plan = ask("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    folders = [re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE) for name in ("INCLUDES", "LIBRARIES")]
    version = re.search(r"V(\d+\.\d+\.\d+)", ask("--version"))
    include_dirs, library_dirs = (re.findall(r'"-[IL]([^"]+)"', found[1]) if found else [] for found in folders)
    library_dirs += [folder.replace("lib64", "lib") for folder in library_dirs]  # those of pip have no lib64
    codes = ask("--list-gpu-code").split()
    return Toolkit(nvcc, version[1] if version else "of unknown version", codes, include_dirs, library_dirs)


def architectures_here(codes: list[str]) -> str:
    """Those of the GPUs of this machine; of most GPUs where there is none, or one that nvcc does not know."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    if not found or any(f"sm_{major}{minor}" not in codes for major, minor in found):
        return CUDA_ARCHITECTURES
    return ";".join(f"{major}.{minor}{'a' if major in SPECIFIC else ''}" for major, minor in found)


def cuda_architectures(codes: list[str]) -> list[str]:
    """What nvcc is to make: code for an architecture (sm_80), and PTX for it and later ones (compute_80)."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    wanted = listed or architectures_here(codes)
    names = []
    for entry in re.split(r"[;\s]+", wanted.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise RuntimeError(f'TORCH_CUDA_ARCH_LIST must be a list such as "{CUDA_ARCHITECTURES}", got "{listed}"')
        major, minor, specific, ptx = found.groups()
        if int(major) < 8:
            say(f"no CUDA kernels for {entry}: they need compute capability 8.0.")
        elif not listed and f"sm_{major}{minor}" not in codes:
            say(f"no CUDA kernels for {entry}: this nvcc does not know it.")
        else:
            names += [f"{kind}_{major}{minor}{specific}" for kind in (("sm", "compute") if ptx else ("sm",))]
    if not names:
        raise RuntimeError(f'nothing has compute capability 8.0 in "{wanted}"; TORCH_CUDA_ARCH_LIST names others')
    return names


def cuda_objects(build_temp: str) -> list[str]:
    """Compiles csrc/cuda/*.cu, each unless it is as it was."""
    nvcc = toolkit().nvcc
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    made_from: dict[str, list[str]] = {}  # of PTX that is code, too, nvcc compiles the source once
    for name in cuda_architectures(toolkit().codes):
        made_from.setdefault(name.replace("sm", "compute"), []).append(name)
    flags += [f"-gencode=arch={ptx},code=[{','.join(names)}]" for ptx, names in made_from.items()]
    if os.environ.get("CONTRASTIVE_OPS_WERROR"):  # registers that spill are errors, too
        flags += ["-Werror=all-warnings", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]
    folder = Path(build_temp) / f"cuda-{hashlib.sha256(repr((nvcc, flags)).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path("csrc/cuda").glob("*.cu"))
    headers = [str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc/cuda").glob(pattern)]
    threads = max(1, jobs() // len(sources))  # of each nvcc, for its architectures

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        if newer_group([str(source), *headers], str(target)):
            command = [nvcc, *flags, f"--threads={threads}", "-c", str(source), "-o", str(target)]
            say(" ".join(command))
            if subprocess.run(command, stdout=sys.stderr).returncode != 0:
                raise CompileError(
                    f"nvcc did not compile {source}, it says above why; NVCC_CCBIN names another host compiler"
                )
        return str(target)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(compile_one, sources))


def build_command():
    """The setuptools command that builds the extensions; needs torch."""
    from torch.utils import cpp_extension as torch_build

    class Build(torch_build.BuildExtension):
        def get_ext_filename(self, name):
            filename = super().get_ext_filename(name)
            if name.endswith(CUDA_NAME.split(".")[-1]):  # it comes with its package, and without
                return os.path.join(os.path.dirname(filename), "_cuda.so")
            return filename

        def build_extension(self, extension):
            extension.extra_objects = (
                cuda_objects(self.build_temp) if extension.name == CUDA_NAME else self.tile_objects(extension)
            )
            extension.depends += extension.extra_objects
            try:
                super().build_extension(extension)
            except RuntimeError as error:  # of ninja; an optional extension may fail to compile, and in no other way
                raise CompileError(str(error)) from error

        def tile_objects(self, extension):
            # PyTorch's ninja build has one set of flags per extension, so these objects are made beforehand
            flags = extension.extra_compile_args["cxx"]
            parts = [
                ("csrc/cpu/tile.cpp", name, [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *options])
                for name, options in INSTRUCTION_SETS.items()
            ]
            if WITH_MATRIX_UNIT in flags:
                parts.append(("csrc/cpu/matrix_unit.cpp", "AMX", MATRIX_UNIT))

            def compile_part(part):
                source, folder, options = part
                return self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, folder),
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*flags, *options],
                    depends=extension.depends,
                )

            with ThreadPoolExecutor(jobs()) as pool:
                return list(itertools.chain.from_iterable(pool.map(compile_part, parts)))

    return Build.with_options(use_ninja=True)


def compiler_flags() -> list[str]:
    flags = [
        "-O3",
        NO_DEBUG,
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 finds them in its own AVX-512 headers
    if os.environ.get("CONTRASTIVE_OPS_WERROR"):
        flags.append("-Werror")
    return flags


def compiles_for_matrix_unit(compiler: str) -> bool:
    """Whether the compiler, its headers and its assembler know AMX."""
    program = "#include <immintrin.h>\nvoid load(const void* a) { _tile_loadd(0, a, 64); _tile_dpbf16ps(2, 0, 1); }\n"
    command = [*shlex.split(compiler), *MATRIX_UNIT, "-x", "c++", "-", "-c", "-o", os.devnull]
    result = subprocess.run(command, input=program, text=True, capture_output=True)
    if result.returncode != 0:
        say(f"without units for bfloat16 (AMX, AVX-512 BF16), which {compiler} does not know.")
    return result.returncode == 0


def cpp_extension():
    """The C++ engine; raises where it can't be built."""
    import torch  # noqa: F401  says why in its own words when it is missing
    from torch.utils import cpp_extension as torch_build

    compiler = torch_build.get_cxx_compiler()
    if torch_build.get_compiler_abi_compatibility_and_version(compiler)[0] is False:
        raise RuntimeError(f"the compiler {compiler} does not fit the one that built torch")
    flags = compiler_flags()
    if sys.platform.startswith("linux"):
        flags += ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
    if X86:
        flags.append("-DCONTRASTIVE_OPS_X86")
        if sys.platform.startswith("linux") and compiles_for_matrix_unit(compiler):
            flags.append(WITH_MATRIX_UNIT)
    return torch_build.CppExtension(
        "contrastive_ops._C",
        [
            "csrc/extension.cpp",
            *(str(path) for path in sorted(Path("csrc/cpu").glob("*.cpp")) if path.name not in APART),
        ],
        extra_compile_args={"cxx": flags},
        extra_link_args=[STRIPPED] if sys.platform.startswith("linux") else [],
        depends=[str(path) for path in Path("csrc/cpu").rglob("*.h")],
    )


def cuda_extension():
    """The CUDA kernels, for any torch from 2.11 on; raises where they can't be built, or run if nobody named them."""
    import torch
    from torch.utils import cpp_extension as torch_build

    if not sys.platform.startswith("linux"):
        raise RuntimeError("they are built on Linux only")
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 11):
        raise RuntimeError(f"they need torch 2.11, here is {torch.__version__}")
    if MODE == "auto" and torch.version.cuda is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no CUDA; CONTRASTIVE_OPS_BUILD=cuda compiles them all the same"
        )
    cuda = toolkit()
    if torch.version.cuda and torch.version.cuda.split(".")[0] != cuda.version.split(".")[0]:
        raise RuntimeError(
            f"torch is for CUDA {torch.version.cuda}, and {cuda.nvcc} of CUDA {cuda.version}; CUDA_HOME names another"
        )
    return torch_build.CppExtension(
        CUDA_NAME,
        ["csrc/cuda/binding.cpp"],
        include_dirs=cuda.include_dirs,
        library_dirs=cuda.library_dirs,
        libraries=["cudart_static", "dl", "rt", "pthread"],
        # that runtime must not take the place of torch's own in other libraries, nor give way to it
        extra_link_args=["-Wl,--exclude-libs,libcudart_static.a", STRIPPED],
        extra_compile_args={"cxx": compiler_flags()},
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("CONTRASTIVE_OPS_NVCC", cuda.version),
            ("CONTRASTIVE_OPS_ARCHITECTURES", ",".join(cuda_architectures(cuda.codes))),
        ],
        depends=[str(path) for path in Path("csrc/cuda").iterdir()],
        optional=MODE == "auto",
        py_limited_api=True,  # it uses nothing of Python
    )


def compiled_parts():
    if MODE not in MODES:
        raise SystemExit(f"CONTRASTIVE_OPS_BUILD must be one of {', '.join(MODES)}, got {MODE!r}.")
    if MODE == "python":
        return [], {}
    try:
        extensions, commands = [cpp_extension()], {"build_ext": build_command()}
    except Exception as error:
        if MODE != "auto":
            raise
        say(
            f"installing as pure Python, without the C++ engine ({error}). "
            'With torch, a C++ compiler, "setuptools>=77", wheel and ninja: pip install --no-build-isolation .'
        )
        return [], {}
    if MODE != "cpp":
        try:
            extensions.append(cuda_extension())
        except RuntimeError as error:
            if MODE == "cuda":
                raise SystemExit(f"CONTRASTIVE_OPS_BUILD=cuda: no CUDA kernels: {error}.") from error
            say(f"installing without the CUDA kernels: {error}.")
    return extensions, commands


def main():
    extensions, commands = compiled_parts()
    setup(
        packages=[
            "contrastive_ops",
            "contrastive_ops.backends",
            "contrastive_ops.demo",
            "contrastive_ops.kernels",
            "contrastive_ops.losses",
            "contrastive_ops.ops",
            "contrastive_ops.reference",
        ],
        # a top-level package `kernels` exists elsewhere, so the folder is a subpackage and has no __init__.py
        package_dir={"contrastive_ops": "contrastive_ops", "contrastive_ops.kernels": "kernels"},
        package_data={"contrastive_ops": ["py.typed"]},
        ext_modules=extensions,
        cmdclass={"sdist": SourceDistribution, **commands},
    )


if __name__ == "__main__":  # a test imports it
    main()
