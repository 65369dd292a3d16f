"""Compile CUDA sources for the CPU, with g++ and the headers of a CUDA toolkit.

Sanitizers see what is in .cu files: the kernels. runtime.cpp must be without them, the rest is faster so.

    python tests/cuda_host/build.py           the engine as a backend: prints the path of the shared object

Objects are kept in build/cuda_host under a hash of all they are made from. Several processes may build at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_host"

FLAGS = ("-std=c++17", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DCONTRASTIVE_OPS_CUDA_HOST")
VARIANTS = {
    "plain": (),
    # of what is undefined, that which costs seconds to compile rather than half a minute
    "asan": ("-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
    "tsan": ("-fsanitize=thread",),
}
RUNTIME = (HERE / "runtime.cpp", HERE / "fiber.cpp")


class BuildError(Exception):
    """What the compiler said."""


def why_not() -> str | None:
    """The sentence that says why this machine can't build for the host, or None."""
    if shutil.which(_compiler()) is None:
        return f"there is no {_compiler()}; install g++, or name a compiler in CXX."
    if _cuda_headers() is None:
        return (
            "there are no CUDA headers (cuda_bf16.h, crt/host_defines.h) in CUDA_HOME, CUDA_PATH, beside nvcc, in "
            "/usr/local/cuda* or in nvidia/cu13 of site-packages; "
            "pip install nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88."
        )
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _cuda_headers() -> Path | None:
    for home in _cuda_homes():
        include = home / "include"
        if (include / "cuda_bf16.h").is_file() and (include / "crt" / "host_defines.h").is_file():
            return include
    return None


def _cuda_homes() -> Iterator[Path]:
    yield from (Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1]
    yield from sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    yield from (Path(packages) / "nvidia" / "cu13" for packages in site.getsitepackages())


def program(
    sources: Iterable[Path], variant: str = "plain", definitions: Sequence[str] = (), kernels: Path = KERNELS
) -> Path:
    """An executable of `sources`, one of which has main; `kernels` is the folder of their includes."""
    return _linked(sources, variant, definitions, kernels, suffix="", link=())


def library(
    sources: Iterable[Path],
    variant: str = "plain",
    definitions: Sequence[str] = (),
    kernels: Path = KERNELS,
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """A shared object of `sources`."""
    return _linked(sources, variant, definitions, kernels, suffix=".so", flags=flags, link=("-shared", *link))


def backend() -> Path:
    """The engine and its binding, registered for CPU tensors in the place of CUDA tensors."""
    from torch.utils import cpp_extension

    torch_lib = Path(cpp_extension.TORCH_LIB_PATH)
    return library(
        [*sorted(KERNELS.glob("*.cu")), KERNELS / "binding.cpp"],
        flags=[f"-isystem{path}" for path in cpp_extension.include_paths()],
        link=[f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"],
    )


def _linked(
    sources: Iterable[Path],
    variant: str,
    definitions: Sequence[str],
    kernels: Path,
    *,
    suffix: str,
    link: Sequence[str],
    flags: Sequence[str] = (),
) -> Path:
    sentence = why_not()
    if sentence is not None:
        raise BuildError(sentence)
    common = (
        *FLAGS,
        *(f"-D{definition}" for definition in definitions),
        f"-I{kernels}",
        f"-I{HERE}",
        f"-isystem{_cuda_headers()}",
        *flags,
    )
    sanitizers = VARIANTS[variant]
    by_suffix = {".cu": (*common, "-O1", *sanitizers), ".cpp": (*common, "-O2", f"-DCUDA_HOST_{variant.upper()}")}
    jobs = [(path, by_suffix[path.suffix]) for path in (*RUNTIME, *sources)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job, kernels), jobs))
    command = [*map(str, objects), *sanitizers, *link]
    name = f"{objects[-1].name.split('-')[0]}-{_digest(command)}{suffix}"
    return _made(CACHE / name, [_compiler(), *command])


def _object(source: Path, flags: Sequence[str], kernels: Path) -> Path:
    # the folders are part of no key: a copy of the sources in another place has the same objects
    named = [flag for flag in flags if not flag.startswith(("-I", "-isystem"))]
    contents = [path.read_text() for path in _files_of(source, kernels)]
    target = CACHE / "objects" / f"{source.stem}-{_digest([_version(), *named, *contents])}.o"
    return _made(target, [_compiler(), *flags, "-x", "c++", "-c", str(source)])


def _made(target: Path, command: Sequence[str]) -> Path:
    """Run a command that makes `target`, unless it is there or another process makes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if not target.exists():
            part = target.with_name(f"{target.name}.part")
            result = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise BuildError(f"{' '.join(command)}\n{result.stderr}")
            part.replace(target)
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with target.with_name(f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files_of(source: Path, kernels: Path) -> list[Path]:
    """A source and all of the project that it includes."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            places = [folder / name for folder in (path.parent, kernels, HERE) if (folder / name).is_file()]
            if places and places[0] not in found:
                found.append(places[0])
    return found


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    try:
        print(backend())
    except BuildError as error:
        sys.exit(str(error))
