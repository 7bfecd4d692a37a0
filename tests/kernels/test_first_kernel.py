"""The kernel that docs/architecture.md writes, before and after its last line, computes what the page says."""

from __future__ import annotations

import re
import shutil
import struct

import pytest
import torch

from tests import ROOT
from tests.emulator import metal_on_cpu
from tests.kernels.launch_plan import assemble

PAGE = (ROOT / "docs" / "architecture.md").read_text()
HEADER, KERNEL, *_, ONE_LANE_READS = re.findall(r"```cpp\n(.*?)```", PAGE, re.DOTALL)
INNER_LOOP = "    for (uint c ="


@pytest.mark.parametrize("improved", [False, True])
def test_the_first_kernel(tmp_path, improved):
    assert KERNEL.count(INNER_LOOP) == KERNEL.count("* factor[row]") == 1
    better = KERNEL.replace("* factor[row]", "* scale").replace(INNER_LOOP, ONE_LANE_READS + INNER_LOOP)
    shutil.copytree(ROOT / "metal", tmp_path / "metal")
    (tmp_path / "metal" / "scale_rows.h").write_text(HEADER)
    path = tmp_path / "metal" / "scale_rows.metal"
    path.write_text(better if improved else KERNEL)
    function = "tfl::scale_rows<half, 1, 8, true, false>"
    instance = f'\ntemplate [[host_name("scale_rows")]] [[kernel]] decltype({function}) {function};\n'
    M, H, rows = 9, 70, 8
    x, factor, y = torch.randn(M, H).half(), torch.rand(M), torch.full((M, H), torch.nan).half()
    pairs = [struct.pack("2I", *pair) for pair in ((M, H), (-(-M // rows), 0), (M, M * H), (H, 1))]
    report = metal_on_cpu.compile(assemble(path) + instance, strict=True)["scale_rows"].dispatch(
        threads=(2 * 32 * rows, 1, 1), group=(32 * rows, 1, 1), arguments=[x, factor, y, *pairs], trace=True
    )
    assert report.findings == []
    torch.testing.assert_close(y, (x.double() * factor.double()[:, None]).half(), rtol=2**-10, atol=2**-24)
    simdgroup_reads = 4 * M  # of a row's only simdgroup
    assert report.counters.loaded[1] == (simdgroup_reads if improved else simdgroup_reads * -(-H // 8))
