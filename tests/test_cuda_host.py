"""CUDA on the CPU (tests/cuda_host) itself: what it must carry out, and what it must find."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from cuda_host import build

PROBE = [build.HERE / "probe.cu"]
SENTENCE = build.why_not()
needs_compiler = pytest.mark.skipif(SENTENCE is not None, reason=f"cuda-host: {SENTENCE}")


def probe(case: str, variant: str = "plain", seed: int = 0, eager: bool = False) -> str:
    command = [build.program(PROBE, variant), case, str(seed), *(["eager"] if eager else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout + result.stderr


RIGHT = ["indices", "warp_operations", "barrier", "warp_barrier", "early_exit", "pipeline", "load", "blocks"]


@needs_compiler
@pytest.mark.parametrize("variant", build.VARIANTS)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(case, variant):
    """Right results whatever the order of threads and blocks, without a complaint of any sanitizer."""
    for seed in range(1 if variant == "tsan" else 3):
        for eager in (False, True):
            assert probe(case, variant, seed, eager) == "ok\n", f"seed {seed}, eager {eager}"


WRONG = {
    # reported by launch(), with the place
    "divergence": r"probe.cu:\d+: lanes of a warp part: this one has come to a shuffle .* a shuffle .* at probe.cu",
    "different_masks": r"with mask fffffff[ef], others to a shuffle with mask fffffff[ef]",
    "foreign_lane": r"a lane asks for the value of one that is not in the mask; block \(0, 0\), thread \d+",
    "foreign_mask": r"a lane is not in the mask that it names",
    "parted_barriers": r"threads of a block part: this one has come to __syncthreads here, others at probe.cu:\d+",
    "deadlock": r"deadlock in block \(0, 0\): 1 threads wait in __syncthreads at probe.cu:\d+, the first is 40; "
    r"31 threads wait in a shuffle at probe.cu:\d+, the first is 32; 32 have ended",
    "copy_to_misaligned": r"copy_async: byte 8 of 64 of shared memory is not aligned to 16 bytes",
    "copy_from_misaligned": r"copy_async: the address in global memory is not aligned to 16 bytes",
    "copy_beyond": r"copy_async: byte 64 of 64 of shared memory is outside of the shared memory of the block",
    "load_misaligned": r"load_matrices: byte 24 of 64 of shared memory is not aligned to 16 bytes",
    "load_beyond": r"load_matrices: byte -16 of 64 of shared memory is outside",
    "not_tf32": r"an operand of multiply_add is not a TF32",
    "no_blocks": r"a grid of 0 x 1 x 1 blocks: each must be at least 1",
    "many_blocks": r"a grid of 1 x 65536 x 1 blocks",
    "many_threads": r"1056 threads in a block: there must be 1 to 1024",
    "much_shared": r"101377 bytes of shared memory: a block has at most 101376",
    # wrong values, by the poison or by the order of the threads
    "no_barrier": "wrong: out",
    "no_warp_barrier": "wrong: out",
    "pipeline_without_wait": "wrong: .* is -?nan",
    "pipeline_without_guard": "wrong: ",
}


@needs_compiler
@pytest.mark.parametrize("case", WRONG)
def test_wrong_kernels(case):
    for seed in range(3):
        assert re.search(WRONG[case], probe(case, seed=seed)), f"seed {seed}"


@needs_compiler
@pytest.mark.parametrize("case", ["after_deadlock", "poison", "all_that_fits"])
def test_after_a_failure_and_at_the_limits(case):
    assert probe(case) == "ok\n"


@needs_compiler
def test_buffer_reused_too_early():
    """A missing barrier before a buffer is used again takes copies that are carried out at once."""
    assert probe("pipeline_without_barrier") == "ok\n"
    assert "wrong: out" in probe("pipeline_without_barrier", eager=True)


@needs_compiler
@pytest.mark.parametrize("case", ["beyond_shared", "before_shared", "beyond_global"])
def test_bounds(case):
    report = probe(case, "asan")
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert re.search(r"probe.cu:\d+", report), "the place in the kernel"


@needs_compiler
def test_alignment():
    assert re.search(r"probe.cu:\d+:\d+: runtime error: .* misaligned address", probe("misaligned", "asan"))


@needs_compiler
@pytest.mark.parametrize(
    ("case", "eager"),
    [
        ("no_barrier", False),
        ("no_warp_barrier", False),
        ("late_write", False),
        ("pipeline_without_barrier", True),
        ("load_without_barrier", False),
        ("race_of_blocks", False),
    ],
)
def test_races(case, eager):
    report = probe(case, "tsan", eager=eager)
    assert "ThreadSanitizer: data race" in report
    assert re.search(r"probe.cu:\d+", report), "the place in the kernel"


@needs_compiler
def test_thread_sanitizer_has_room():
    assert "ThreadSanitizer has room for 8000 threads" in probe("many_fibers", "tsan")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.library(PROBE)))
    for name in ("probe_multiply", "probe_load", "probe_strides", "contrastive_ops_host_wavefronts"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.probe_round_to_tf32.restype = ctypes.c_uint32
    loaded.probe_round_to_tf32.argtypes = [ctypes.c_float]
    return loaded


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


FORMATS = {
    "SM80_16x8x8_F32TF32TF32F32_TN": (0, lambda x: x.astype(np.float32)),
    "SM80_16x8x16_F32BF16BF16F32_TN": (1, lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)),
    "SM80_16x8x16_F32F16F16F32_TN": (2, lambda x: x.astype(np.float16)),
}


@needs_compiler
@pytest.mark.parametrize("atom", FORMATS)
def test_fragments_of_multiply_add(atom, library):
    """The layouts of tensor_layouts, which are those of CUTLASS: place (lane, i) of a fragment has element m + k M."""
    nvidia = pytest.importorskip("tensor_layouts.atoms_nv", reason="tensor-layouts: not installed")
    layouts = getattr(nvidia, atom)
    m, n, k = layouts.shape_mnk
    dtype, encode = FORMATS[atom]
    generator = np.random.default_rng(0)
    a, b, d = (generator.integers(-8, 9, shape).astype(np.float32) for shape in ((m, k), (n, k), (m, n)))

    def places(layout: object, size: int) -> np.ndarray:
        return np.array([[layout(lane, i) for i in range(size // 32)] for lane in range(32)])

    a_words = encode(a.T.ravel()[places(layouts.a_layout, a.size)]).view(np.uint32).copy()
    b_words = encode(b.T.ravel()[places(layouts.b_layout, b.size)]).view(np.uint32).copy()
    d_places = places(layouts.c_layout, d.size)
    d_fragments = d.T.ravel()[d_places].copy()
    assert library.probe_multiply(dtype, pointer(a_words), pointer(b_words), pointer(d_fragments)) is None
    product = np.full(d.size, np.nan, np.float32)
    product[d_places] = d_fragments
    np.testing.assert_array_equal(product.reshape(n, m).T, d + a @ b.T)


@needs_compiler
@pytest.mark.parametrize(("atom", "transposed"), [("SM75_U32x4_LDSM_N", False), ("SM75_U16x8_LDSM_T", True)])
def test_fragments_of_load_matrices(atom, transposed, library):
    nvidia = pytest.importorskip("tensor_layouts.atoms_nv", reason="tensor-layouts: not installed")
    layout = getattr(nvidia, atom).dst_layout_bits
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    aligned = np.empty(rows.nbytes + 16, np.uint8)
    aligned = aligned[-aligned.ctypes.data % 16 :][: rows.nbytes]
    aligned[:] = rows.view(np.uint8).ravel()
    fragments = np.empty((32, 4), np.uint32)
    assert library.probe_load(pointer(aligned), transposed, pointer(fragments)) is None
    expected = [[layout(lane, 16 * i) // 16 for i in range(8)] for lane in range(32)]
    np.testing.assert_array_equal(fragments.view(np.uint16), rows.ravel()[np.array(expected)])


@needs_compiler
@pytest.mark.parametrize("stride", [16, 32, 48, 64, 80, 128, 144, 256, 272])
def test_wavefronts(stride, library):
    """Rows of 16 bytes: 8 lanes take as many wavefronts as have the same banks, of which a row has 4 of 32."""
    library.contrastive_ops_host_wavefronts()
    assert library.probe_strides(stride) is None
    ways = math.gcd(stride // 16, 8)
    lines = library.contrastive_ops_host_wavefronts().decode().splitlines()
    counts = {name: (site, int(taken), int(least)) for name, site, taken, least in (re.split(",? ", x) for x in lines)}
    assert counts.keys() == {"copy_async", "load_matrices", "load_matrices_transposed"}
    for site, taken, least in counts.values():
        assert re.fullmatch(r"probe.cu:\d+", site)
        assert (taken, least) == (4 * ways, 4)
    assert library.contrastive_ops_host_wavefronts() == b"", "since the last call"


@needs_compiler
def test_round_to_tf32(library):
    """The nearest of 10 bits, ties away from zero."""
    generator = np.random.default_rng(0)
    values = np.ldexp(generator.uniform(-2, 2, 1000), generator.integers(-100, 100, 1000)).astype(np.float32)
    ties = np.ldexp([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11], [0, 3, -5]).astype(np.float32)
    for value in [*values, *ties, np.float32(0), np.float32("inf")]:
        rounded = np.uint32(library.probe_round_to_tf32(value)).view(np.float32)
        mantissa, exponent = np.frexp(np.float64(value))
        steps = np.abs(mantissa) * 2**11
        expected = value if np.isinf(value) else np.ldexp(np.copysign(np.floor(steps + 0.5), value), exponent - 11)
        assert rounded == expected, value
    rounded = np.uint32(library.probe_round_to_tf32(float("nan")))
    assert np.isnan(rounded.view(np.float32))
    assert rounded & 0x1FFF == 0


@needs_compiler
def test_build_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    source, header = tmp_path / "one.cu", tmp_path / "one.h"
    source.write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    header.write_text("#define ONE 1\n")
    first = build.library([source])
    assert ctypes.CDLL(str(first)).one() == 1
    made = first.stat().st_mtime_ns
    assert build.library([source]) == first
    assert first.stat().st_mtime_ns == made
    header.write_text("#define ONE 2\n")
    assert ctypes.CDLL(str(build.library([source]))).one() == 2
    assert build.library([source], definitions=["TWO"]) != build.library([source])
    source.write_text("int one(")
    with pytest.raises(build.BuildError, match=r"one\.cu:1:.*error"):
        build.library([source])


def test_why_not(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else f"{tmp_path}/bin/{name}")
    monkeypatch.delenv("CXX", raising=False)
    assert build.why_not() == "there is no g++; install g++, or name a compiler in CXX."
    monkeypatch.setattr(shutil, "which", lambda name: f"{tmp_path}/bin/{name}")
    monkeypatch.setattr(build, "_cuda_homes", lambda: iter([tmp_path]))
    assert "no CUDA headers" in build.why_not()
    with pytest.raises(build.BuildError, match="no CUDA headers"):
        build.program(PROBE)
    (tmp_path / "include" / "crt").mkdir(parents=True)
    (tmp_path / "include" / "cuda_bf16.h").touch()
    (tmp_path / "include" / "crt" / "host_defines.h").touch()
    assert build.why_not() is None
