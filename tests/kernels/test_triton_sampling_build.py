"""What the sampling kernels take when compiled, for 151,936 ids."""

import pytest

from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")

ROW = {"size": "i32", "row_stride": "i32", "num_groups": "i32", "splits": "i32"}
FLOATS = ("logits", "temperature", "top_p", "min_p", "tops", "masses", "maxima", "totals", "best", "values")
INTS = ("top_k", "words", "top_ids", "drawn", "bounds", "listed", "counts", "ids", "list_ids")
TYPES = {**ROW, **dict.fromkeys((*FLOATS, "list_values"), "*fp32"), **dict.fromkeys(INTS, "*i32"), "out_ids": "*i64"}


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    scan = {"GROUP": 64, "GROUPS": 32, "FILTERED": True}
    settle = {"SPLITS": 128, "ALL_GROUPS": 4_096, "FILTERED": True}
    lists = {"CAPACITY": 16_384}
    aligned = ("logits", "size", "row_stride")
    home = "embedllm_kernels.triton.sampling"
    builds = [
        Build(f"{home}:_scan", TYPES, scan, aligned),
        Build(f"{home}:_scan", TYPES, {**scan, "FILTERED": False}, aligned),
        Build(f"{home}:_settle", TYPES, settle, aligned, num_warps=8),
        Build(f"{home}:_settle", TYPES, {**settle, "FILTERED": False}, aligned, num_warps=8),
        Build(f"{home}_filter:list_candidates", TYPES, {**lists, "BLOCK": 2_048}, aligned),
        Build(f"{home}_filter:draw_filtered", TYPES, {**lists, "TILE": 4_096}, (*aligned, "list_values"), num_warps=8),
    ]
    resources = compile_for(capability, builds)
    for build, found in zip(builds, resources, strict=True):
        assert found.registers <= 160 and found.local == 0 and found.shared <= 16_384, build.kernel
        assert "lg2.approx" not in found.ptx, "a logarithm near 1 would be wrong"
    assert "ld.global.v4" in resources[0].ptx, "loads are not vectorised"
