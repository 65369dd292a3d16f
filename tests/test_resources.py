"""bench/RESOURCES.md is what the kernels compile to, and nothing in it is beyond what a GPU has."""

from __future__ import annotations

import dataclasses
import difflib

import pytest

from bench import resources

WITHOUT_PRODUCTS = (
    "excluded", "merge", "scale", "scale_backward", "contrast", "contrast_backward", "incoming", "bound", "units",
    "units_backward", "factor", "volume_gradient", "tuple_gradient", "classes", "class_sums", "class_mean",
    "class_mean_backward", "class_contrast", "class_contrast_backward",
)  # fmt: skip
# Its tilings are the fastest of those measured on an H200, and some that spill are ahead of others that do not.
MEASURED = "cuda:90"


@pytest.mark.parametrize("target", resources.LIMITS)
def test_kernels_compile_for(target):
    """No spills where none was measured, shared memory within bounds, products of 16 bits on the matrix unit; and else
    what was committed."""
    sentence = resources.why_not(target)
    if sentence is not None:
        pytest.skip(f"{target}: {sentence}")
    rows = resources.compile_for(target)
    limits = resources.LIMITS[target]
    for row in rows:
        assert row.spills == 0 or target == MEASURED, row
        assert row.registers <= limits.registers, row
        assert row.shared <= limits.program_shared, row
        assert row.matrix > 0 or row.dtype == "float32" or row.kernel in WITHOUT_PRODUCTS, row
        assert row.conflicts == 0, row
        assert resources.programs(target, row) > 0, row

    compiler, (committed, table) = resources.compiler(target), resources.committed(target)
    if compiler != committed:
        pytest.skip(f"{target}: all gates hold; bench/RESOURCES.md is of {committed}, here is {compiler}.")
    now = resources.section(target, rows)
    if table.strip() != now.strip():
        _, _, columns, _, *kernels = now.splitlines()
        changes = difflib.unified_diff(table.splitlines()[4:], kernels, resources.PAGE.name, "now", n=0, lineterm="")
        message = (f"{target} is not what bench/RESOURCES.md says.", "", columns, *changes)
        pytest.fail("\n".join([*message, "", f"If that is meant: {resources.COMMAND}"]), pytrace=False)


def test_programs_of_a_multiprocessor():
    """As CUDA's own calculator has it: limited by shared memory on sm_80, by registers on sm_90."""
    row = resources.Row("", "", "", "", warps=4, stages=2, registers=79, spills=0, shared=27776, matrix=1)
    assert [resources.programs(target, row) for target in ("cuda:80", "cuda:90")] == [5, 6]
    assert resources.programs("cuda:90", dataclasses.replace(row, registers=72)) == 7
