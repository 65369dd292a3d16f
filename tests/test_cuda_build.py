"""The CUDA kernels as a build: what setup.py finds and makes, the library beside torch, what the backend says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import contrastive_ops as co
from contrastive_ops import backends, build, info

ROOT = Path(__file__).parents[1]
LIBRARY = Path(build.__file__).with_name("_cuda.so")
OPERATORS = ("forward", "excluded", "merge", "block", "rows", "attention", "factor")
X = torch.zeros(4, 3)

built = pytest.mark.skipif(build.cuda is None, reason=f"cuda: {build.cuda_missing}")


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, on a machine where nothing of CUDA is known."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CONTRASTIVE_OPS_BUILD", "CONTRASTIVE_OPS_WERROR"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_of_contrastive_ops", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HOMES", ())
    wheels(module, (), monkeypatch)
    monkeypatch.setenv("PATH", os.defpath)
    return module


def wheels(module, folders, monkeypatch):
    """The package `nvidia`, which several wheels fill."""
    spec, find_spec = SimpleNamespace(submodule_search_locations=folders), importlib.util.find_spec
    found = lambda name, *package: spec if name == "nvidia" else find_spec(name, *package)  # noqa: E731
    monkeypatch.setattr(module.importlib.util, "find_spec", found)


def fake_nvcc(folder, version="13.0.88", codes="sm_80 sm_90 sm_100"):
    """A compiler that answers as nvcc does, and writes what it was asked for."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"""#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {version[:4]}, V{version}";;
  --list-gpu-code) echo {codes} | tr ' ' '\\n';;
  --dryrun)
    echo '#$ INCLUDES="-I{folder}/include"  ' >&2
    echo '#$ LIBRARIES=  "-L{folder}/lib64/stubs" "-L{folder}/lib64"' >&2;;
  *) for last; do :; done; echo "$@" >> {folder}/asked; [ ! -e {folder}/broken ] && touch "$last";;
esac
""")
    nvcc.chmod(0o755)
    return str(nvcc)


# the toolkit


def test_kernels_include_no_header_of_torch():
    """Only the binding does, and of these only the stable ones; so the kernels need nothing but nvcc."""
    sources = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    assert {"sweep.h", "device.cuh"} <= {path.name for path in sources}
    for path in sources:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch", "ATen", "c10", "pybind11"))], path.name
    includes = re.findall(r"#include <([^>]*/[^>]*)>", (ROOT / "csrc" / "cuda" / "binding.cpp").read_text())
    assert includes
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in includes), includes


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_of_the_environment(setup_py, variable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(fake_nvcc(tmp_path / "path")).parent))
    nvcc = fake_nvcc(tmp_path / "named")
    monkeypatch.setenv(variable, str(tmp_path / "named"))
    assert setup_py.find_nvcc() == nvcc
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(RuntimeError, match=f"^{variable} is .*, where there is no bin/nvcc$"):
        setup_py.find_nvcc()


def test_toolkit_that_is_found(setup_py, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"^no nvcc in CUDA_HOME, CUDA_PATH, PATH, "):
        setup_py.find_nvcc()
    wheel = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13")
    wheels(setup_py, [str(tmp_path / "site" / "nvidia")], monkeypatch)
    assert setup_py.find_nvcc() == wheel
    monkeypatch.setattr(setup_py, "HOMES", (tmp_path / "local",))
    local = fake_nvcc(tmp_path / "local")
    assert setup_py.find_nvcc() == local
    first = fake_nvcc(tmp_path / "first")
    monkeypatch.setenv("PATH", f"{Path(first).parent}{os.pathsep}{os.defpath}")
    assert setup_py.find_nvcc() == first


def test_nvcc_says_where_its_toolkit_is(setup_py, tmp_path, monkeypatch):
    """It may be a script in a folder that has nothing else."""
    real = fake_nvcc(tmp_path / "toolkit")
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    found = setup_py.toolkit()
    assert (found.nvcc, found.version) == (str(script), "13.0.88")
    assert found.codes == ["sm_80", "sm_90", "sm_100"]
    assert found.include_dirs == [f"{tmp_path}/toolkit/include"]
    assert found.library_dirs == [f"{tmp_path}/toolkit/{of}" for of in ("lib64/stubs", "lib64", "lib/stubs", "lib")]


def test_architectures(setup_py, monkeypatch, capsys):
    codes = ["sm_80", "sm_90", "sm_100"]
    default = ["sm_80", "compute_80", "sm_90a", "sm_100a"]
    assert setup_py.cuda_architectures(codes) == default
    assert setup_py.cuda_architectures(codes[:2]) == default[:3]
    assert "no CUDA kernels for 10.0a: this nvcc does not know it." in capsys.readouterr().err
    for listed, names in {
        "8.6": ["sm_86"],
        "7.5 8.0;9.0a+PTX": ["sm_80", "sm_90a", "compute_90a"],
        "12.0+PTX": ["sm_120", "compute_120"],
    }.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert setup_py.cuda_architectures(codes) == names
    assert "no CUDA kernels for 7.5: they need compute capability 8.0." in capsys.readouterr().err
    for listed, sentence in {"7.5": "nothing has", "Hopper": "must be a list such as"}.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        with pytest.raises(RuntimeError, match=sentence):
            setup_py.cuda_architectures(codes)


def test_architectures_of_the_gpus_here(setup_py, monkeypatch):
    codes = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100"]
    gpus: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: gpus[gpu])
    everywhere = ["sm_80", "compute_80", "sm_90a", "sm_100a"]
    for capabilities, names in {
        ((9, 0),): ["sm_90a"],
        ((10, 0), (8, 6), (10, 0)): ["sm_86", "sm_100a"],
        ((12, 0),): everywhere,  # this nvcc does not know it
        (): everywhere,
    }.items():
        gpus[:] = capabilities
        assert setup_py.cuda_architectures(codes) == names
    gpus[:] = [(7, 5)]
    with pytest.raises(
        RuntimeError, match=r'^nothing has compute capability 8\.0 in "7\.5"; TORCH_CUDA_ARCH_LIST names'
    ):
        setup_py.cuda_architectures(codes)
    gpus[:] = [(9, 0)]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert setup_py.cuda_architectures(codes) == ["sm_80"]


def test_objects_are_made_again_only_if_something_changed(setup_py, tmp_path, monkeypatch):
    fake_nvcc(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda", ignore=shutil.ignore_patterns("*.cu"))
    for name in ("one.cu", "two.cu"):
        (tmp_path / "csrc" / "cuda" / name).touch()
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "cuda" / "asked"

    def asked() -> list[str]:
        log.write_text("")
        objects = setup_py.cuda_objects("temporary")
        assert [Path(name).name for name in objects] == ["one.o", "two.o"]
        return log.read_text().splitlines()

    def touch(name):
        newer = max(path.stat().st_mtime for path in tmp_path.rglob("*.o")) + 10
        os.utime(tmp_path / "csrc" / "cuda" / name, (newer, newer))

    first = asked()
    assert len(first) == 2
    assert all(
        "-gencode=arch=compute_80,code=[sm_80,compute_80]" in line and "warn-spills" not in line for line in first
    )
    assert asked() == []
    touch("two.cu")
    (line,) = asked()
    assert "two.cu" in line
    monkeypatch.setenv("CONTRASTIVE_OPS_WERROR", "1")
    assert all("-Xptxas=-warn-spills,-warn-lmem-usage,-Werror" in line for line in asked())
    (tmp_path / "cuda" / "broken").touch()
    touch("device.cuh")
    with pytest.raises(setup_py.CompileError, match=r"^nvcc did not compile csrc/cuda/one\.cu"):
        setup_py.cuda_objects("temporary")


# what a mode builds


def extensions(setup_py, mode, monkeypatch):
    monkeypatch.setattr(setup_py, "MODE", mode)
    return [extension.name for extension in setup_py.compiled_parts()[0]]


def test_modes_with_nvcc(setup_py, tmp_path, monkeypatch, capsys):
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    both = ["contrastive_ops._C", "contrastive_ops._cuda"]
    for version, in_auto in (("13.0", both), (None, both[:1])):
        monkeypatch.setattr(torch.version, "cuda", version)
        names = {mode: extensions(setup_py, mode, monkeypatch) for mode in setup_py.MODES}
        assert names == {"auto": in_auto, "cuda": both, "cpp": both[:1], "python": []}
    text = f"installing without the CUDA kernels: torch {torch.__version__} has no CUDA; CONTRASTIVE_OPS_BUILD=cuda "
    assert text in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # only what nobody asked for by name may fail
    for mode, optional in {"auto": True, "cuda": False}.items():
        monkeypatch.setattr(setup_py, "MODE", mode)
        assert setup_py.compiled_parts()[0][1].optional is optional


def refused(setup_py, sentence, monkeypatch, capsys):
    """auto says it and goes on, cuda says it and ends."""
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    assert extensions(setup_py, "auto", monkeypatch) == ["contrastive_ops._C"]
    assert re.search(f"installing without the CUDA kernels: .*{sentence}", capsys.readouterr().err)
    with pytest.raises(SystemExit, match=f"^CONTRASTIVE_OPS_BUILD=cuda: no CUDA kernels: .*{sentence}"):
        extensions(setup_py, "cuda", monkeypatch)


def test_no_kernels_without_nvcc(setup_py, monkeypatch, capsys):
    refused(setup_py, "no nvcc in CUDA_HOME", monkeypatch, capsys)


def test_no_kernels_for_an_older_torch(setup_py, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    refused(setup_py, r"they need torch 2\.11, here is 2\.10\.0\+cpu", monkeypatch, capsys)


def test_no_kernels_for_a_torch_of_another_cuda(setup_py, tmp_path, monkeypatch, capsys):
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    refused(
        setup_py, r"torch is for CUDA 12\.6, and .* of CUDA 13\.0\.88; CUDA_HOME names another", monkeypatch, capsys
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="built with these flags on Linux")
def test_nothing_is_for_a_debugger(setup_py, tmp_path, monkeypatch):
    """Python's own flags have -g: the engine was 30 MB, and is 1.3."""
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup_py, "MODE", "cuda")
    for extension in setup_py.compiled_parts()[0]:
        assert "-g0" in extension.extra_compile_args["cxx"]
        assert "-Wl,--strip-all" in extension.extra_link_args


# the library

# what torch 2.11 offers, by its libtorch_cpu.so, of what the library takes
OF_TORCH = {
    *(f"torch_{name}" for name in ("delete_string", "string_c_str", "string_length")),
    *(f"aoti_torch_device_type_{name}" for name in ("cpu", "cuda", "meta", "mps", "privateuse1", "xpu")),
    *(
        f"aoti_torch_dtype_{name}"
        for name in (
            "bfloat16",
            "bool",
            "complex128",
            "complex32",
            "complex64",
            "float16",
            "float32",
            "float64",
            "float8_e4m3fn",
            "float8_e4m3fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
            "int16",
            "int32",
            "int64",
            "int8",
            "uint16",
            "uint32",
            "uint64",
            "uint8",
        )
    ),
    "aoti_torch_abi_version",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_size",
    "aoti_torch_get_sizes",
    "aoti_torch_is_contiguous",
    "aoti_torch_library_def",
    "aoti_torch_library_init_def",
    "aoti_torch_library_init_impl",
    "torch_delete_list",
    "torch_dtype_float4_e2m1fn_x2",
    "torch_dtype_float8_e8m0fnu",
    "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr",
    "torch_library_impl",
    "torch_list_get_item",
    "torch_list_size",
    "torch_new_string_handle",
}


def symbols(kind: str) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm is not here; install binutils")
    lines = subprocess.check_output(["nm", "-D", f"--{kind}-only", LIBRARY], text=True).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


@built
def test_the_library_loads_in_the_oldest_torch():
    """Built against a newer one it takes nothing that torch 2.11 has not."""
    assert {
        name for name in symbols("undefined") if re.match(r"(aoti_)?torch_|_ZN.*(torch|c10|at)\d", name)
    } <= OF_TORCH


@built
def test_the_library_registers_the_cuda_key():
    """Also beside a torch without CUDA."""
    for name in OPERATORS:
        qualified = f"contrastive_ops_cuda::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"), name
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"), name
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        torch.ops.contrastive_ops_cuda.factor(X[None], X[None].double(), X[0].double())


@built
@pytest.mark.parametrize(
    ("reduction", "members"), [*(("logsumexp", members) for members in range(5)), ("softplus", 0), ("expectation", 0)]
)
def test_tilings(reduction, members):
    """In self-similarity the diagonal is between tiles of rows."""
    rows, cols = torch.ops.contrastive_ops_cuda.tiling(reduction, members)
    assert rows % cols == 0
    for dtype in backends.cuda.DTYPES:
        assert all(size >= 0 for size in torch.ops.contrastive_ops_cuda.rows_tiling(dtype, 128))


@built
def test_the_library_needs_no_library_of_cuda():
    names = symbols("undefined")
    assert "torch_library_impl" in names
    assert {name for name in names if "cuda" in name.lower()} <= {"aoti_torch_device_type_cuda"}
    assert not [name for name in symbols("defined") if "cuda" in name]  # the runtime inside is for this library alone


def test_loading_says_what_is_wrong(tmp_path):
    sentence = build.load_cuda(tmp_path / "_cuda.so")
    assert sentence.startswith("the CUDA kernels are not part of this installation; ")
    (tmp_path / "_cuda.so").write_text("not a library")
    sentence = build.load_cuda(tmp_path / "_cuda.so")
    assert re.match(r"the CUDA kernels do not load \(.*\); this rebuilds them for torch 2", sentence)
    assert sentence.endswith(f"{build.install(CONTRASTIVE_OPS_BUILD='cuda')}.")


# what the backend says


class Gpu:
    """Stands for a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with an H100 and the kernels, by all that is asked."""
    kernels = build.Cuda("nvcc 13.0.88", ("sm_80", "compute_80", "sm_90a"))
    monkeypatch.setattr(build, "cuda", kernels)
    monkeypatch.setattr(build, "cuda_missing", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def why_not(x) -> str | None:
    return backends.why_not("cuda", "similarity_logsumexp", x)


def test_why_not(with_gpu, monkeypatch):
    assert why_not(Gpu()) is None
    assert backends.why_not("cuda", "attention", X) == "cuda has no attention."
    assert why_not(X) == "cuda runs GPU tensors, got a tensor on cpu."
    assert why_not(Gpu(torch.float64)) == "cuda takes float32, bfloat16, float16, got float64."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(Gpu()) == "torch finds no GPU."
    monkeypatch.setattr(build, "cuda", None)
    monkeypatch.setattr(build, "cuda_missing", "not built here.")
    assert why_not(X) == "not built here."
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_not(X) == f"torch {torch.__version__} has no CUDA; install one that has."


def test_a_gpu_for_which_nothing_was_compiled(with_gpu, monkeypatch):
    monkeypatch.setattr(build, "cuda", build.cuda._replace(architectures=("sm_90a", "sm_100a")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert why_not(Gpu()) == (
        "the CUDA kernels are compiled for sm_90a, sm_100a, and this GPU has compute capability 12.0; this compiles "
        f"them for it: {build.install(CONTRASTIVE_OPS_BUILD='cuda', TORCH_CUDA_ARCH_LIST='')}."
    )


@pytest.mark.parametrize(
    ("architecture", "runs"),
    {
        "sm_80": [(8, 0), (8, 6), (8, 9)],
        "sm_86": [(8, 6), (8, 9)],
        "sm_90a": [(9, 0)],
        "sm_100f": [(10, 0), (10, 3)],
        "compute_80": [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)],
        "compute_100a": [(10, 0)],
        "compute_100f": [(10, 0), (10, 3)],
    }.items(),
)
def test_what_runs_where(architecture, runs):
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [number for number in every if backends.cuda.no_code((architecture,), number) is None] == runs


def test_cuda_is_taken_once_it_is_checked(with_gpu, monkeypatch):
    """A GPU's engines are asked in their order; on the CPU none is."""
    asked = []

    def first_trusted(op, names, modules, device, dtype):
        asked.append(names)
        return names[0]

    monkeypatch.setattr(backends.trust, "first_trusted", first_trusted)
    monkeypatch.setattr(backends.triton, "why_not", lambda op, x: "not here.")
    assert backends.choose("similarity_logsumexp", Gpu(), "auto") == "cuda"
    assert asked == [("cuda", "tiled")]
    assert backends.choose("similarity_logsumexp", Gpu(torch.float64), "auto") == "tiled"
    assert "cuda" not in backends.AUTO
    assert "  cuda       can't: " in str(co.explain(X))


def test_info_says_what_was_built(monkeypatch):
    kernels = build.Cuda("nvcc 13.0.88", ("sm_80", "compute_80"))
    monkeypatch.setattr(build, "cuda", kernels)
    assert dict(info.report())["CUDA kernels"] == "built with nvcc 13.0.88 for sm_80, compute_80"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "cuda", None)
    monkeypatch.setattr(build, "cuda_missing", "not built here.")
    lines = dict(info.report())
    assert lines["CUDA kernels"] == "not loaded: not built here."
    assert lines["cuda on cpu"] == "can't: not built here."
