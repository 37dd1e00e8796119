"""What a machine without a GPU can prove of the code that is for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2] / "src" / "medclip_hf" / "modeling" / "conceptclip" / "patch_search_triton.py"

COMPILE = r"""
import importlib.util, json, os, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("kernel", sys.argv[1])
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
def resources(capability, element, product, one):
    signature = {"patches": element, "concepts": element, "values": "*fp32", "indices": "*i64"}
    signature |= dict.fromkeys(("num_patches", "num_concepts", "width", "num_blocks"), "i32")
    constants = {"PRODUCT": product, "PRECISION": "tf32x3", "BLOCK_P": kernel.BLOCK_PATCHES}
    constants |= {"BLOCK_N": kernel.BLOCK_CONCEPTS, "BLOCK_D": kernel.BLOCK_WIDTH[product]}
    constants |= dict.fromkeys(one, 1)  # Triton compiles an argument of 1 as a constant
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 6)}  # pointers, and a width such as 1152
    source = ASTSource(kernel._search, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with open(sys.argv[2], "wb") as cubin:
        cubin.write(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    told = subprocess.run([tool, "--dump-resource-usage", sys.argv[2]], capture_output=True, text=True).stdout
    stack = re.search(r"STACK:(\d+)", told)
    return {
        "shared": compiled.metadata.shared,
        "uses_tensor_cores": bool(re.search(r"mma\.sync|wgmma", compiled.asm["ptx"])),
        "stack": int(stack[1]) if stack else 0,
    }


cases = [(80, "*bf16", "bf16", ("num_blocks", "num_patches")), (80, "*fp32", "fp32", ()), (90, "*fp32", "bf16", ())]
print(json.dumps([resources(*case) for case in cases]))
"""


def test_the_kernel_of_the_patch_search_fits_gpus_and_uses_their_tensor_cores(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(KERNEL), str(tmp_path / "cubin")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    for found in json.loads(ended.stdout.splitlines()[-1]):
        assert found["shared"] < 99 * 1024, "more shared memory than the smaller GPUs have"
        assert found["uses_tensor_cores"]
        assert found["stack"] <= 64, "the registers do not suffice: in float32 it was a kilobyte once"
