"""Build of the compiled parts. Everything declarative is in pyproject.toml.

CONTRASTIVE_OPS_BUILD chooses: "auto" compiles what this machine can and installs as pure Python otherwise, "python"
compiles nothing, "cpp" (and "cuda") compile or fail. MAX_JOBS bounds the parallel compilations.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

MODES = ("auto", "python", "cpp", "cuda")
MODE = os.environ.get("CONTRASTIVE_OPS_BUILD", "auto")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# csrc/cpu/tile.cpp is compiled once for each; which one runs is decided when the process starts
INSTRUCTION_SETS = {"DEFAULT": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX2"] = avx2
    INSTRUCTION_SETS["AVX512"] = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


class SourceDistribution(sdist):
    """With the sources of what is compiled, also when it is made where nothing can be compiled."""

    def make_release_tree(self, base_dir, files):
        sources = (path for folder in ("csrc", "kernels", "tests", "bench") for path in Path(folder).rglob("*"))
        more = {str(path) for path in sources if path.is_file() and "__pycache__" not in path.parts}
        super().make_release_tree(base_dir, [*files, *sorted(more.difference(files))])


def say(text: str) -> None:
    """pip hides standard output; this reaches the log of `pip -v` and of a failed build."""
    print(f"contrastive_ops: {text}", file=sys.stderr)


def cpp_extension():
    """The C++ engine and the command that builds it; raises where it can't be built."""
    import torch  # noqa: F401  says why in its own words when it is missing
    from torch.utils import cpp_extension as torch_build

    class Build(torch_build.BuildExtension):
        def build_extension(self, extension):
            # PyTorch's ninja build has one set of flags per extension, so these objects are made beforehand
            for name, flags in INSTRUCTION_SETS.items():
                extension.extra_objects += self.compiler.compile(
                    ["csrc/cpu/tile.cpp"],
                    output_dir=os.path.join(self.build_temp, name),
                    include_dirs=extension.include_dirs,
                    extra_postargs=[
                        *extension.extra_compile_args["cxx"],
                        f"-DCPU_CAPABILITY={name}",
                        f"-DCPU_CAPABILITY_{name}",
                        *flags,
                    ],
                    depends=extension.depends,
                )
            super().build_extension(extension)

    compiler = torch_build.get_cxx_compiler()
    if torch_build.get_compiler_abi_compatibility_and_version(compiler)[0] is False:
        raise RuntimeError(f"the compiler {compiler} does not fit the one that built torch")
    flags = [
        "-O3",
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
    if sys.platform.startswith("linux"):
        flags += ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
    if X86:
        flags.append("-DCONTRASTIVE_OPS_X86")
    extension = torch_build.CppExtension(
        "contrastive_ops._C",
        ["csrc/extension.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/similarity_logsumexp.cpp"],
        extra_compile_args={"cxx": flags},
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
    )
    return [extension], {"build_ext": Build.with_options(use_ninja=True)}


def compiled_parts():
    if MODE not in MODES:
        raise SystemExit(f"CONTRASTIVE_OPS_BUILD must be one of {', '.join(MODES)}, got {MODE!r}.")
    if MODE == "cuda":
        raise SystemExit("CONTRASTIVE_OPS_BUILD=cuda: this version has no CUDA kernels; use auto or cpp.")
    if MODE == "python":
        return [], {}
    try:
        return cpp_extension()
    except Exception as error:
        if MODE == "cpp":
            raise
        say(
            f"installing as pure Python, without the C++ engine ({error}). "
            "With torch and a C++ compiler: pip install --no-build-isolation ."
        )
        return [], {}


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
