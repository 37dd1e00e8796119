"""What a machine without a GPU can prove of the code that is for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2] / "src" / "medclip_hf" / "modeling" / "conceptclip" / "patch_search_triton.py"

COMPILE = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("kernel", sys.argv[1])
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
signature = {"patches": "*bf16", "concepts": "*bf16", "values": "*fp32", "indices": "*i64"}
signature |= dict.fromkeys(("num_patches", "num_concepts", "width"), "i32")
constants = {"PRODUCT": "bf16", "BLOCK_P": kernel.BLOCK_PATCHES, "BLOCK_N": kernel.BLOCK_CONCEPTS}
constants |= {"BLOCK_D": kernel.BLOCK_WIDTH}
source = ASTSource(fn=kernel._search, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
assert compiled.asm["cubin"]
assert compiled.metadata.shared < 99 * 1024, "more shared memory than the smaller GPUs have"
"""


def test_the_kernel_of_the_patch_search_compiles_for_gpus(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(KERNEL)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
