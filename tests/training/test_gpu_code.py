"""What a machine without a GPU can prove of the code that is for GPUs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medclip_hf.evaluation.embedding_run import _Kept

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


@pytest.fixture(scope="module")
def on_pretended_gpu(tmp_path_factory):
    """What went wrong in steps on a GPU that is not there, and where the host waited for it."""
    if torch.version.cuda is not None or not hasattr(torch._C, "_set_only_lift_cpu_tensors"):
        pytest.skip("only a PyTorch without CUDA, of the version that this was made for, can pretend to have it")
    if shutil.which("g++") is None:
        pytest.skip("a pretended GPU needs g++")
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("pretended_gpu.py"), tmp_path_factory.mktemp("gpu")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_no_tensor_of_a_step_is_on_another_device(on_pretended_gpu):
    assert "elsewhere" in on_pretended_gpu["errors"].pop("devices mixed")  # it would be noticed
    assert on_pretended_gpu["errors"] == {}


def test_a_step_waits_for_the_device_as_often_as_is_told(on_pretended_gpu):
    waits = {name: sum(counts.values()) for name, counts in on_pretended_gpu["waits"].items()}
    # docs/speed.md: once a text pass whether any token is masked; ConceptCLIP once how many concepts there are
    assert (waits["ConceptCLIP"], waits["ConceptCLIP, 4 micro-batches"]) == (2, 9)
    assert (waits["fVLM"], waits["fVLM, 4 micro-batches"]) == (1, 8)


def test_embeddings_are_waited_for_on_the_device_that_computes_them(monkeypatch):
    recorded = []

    class Event:
        def record(self, stream):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    _Kept(torch.device("cuda", 1), torch.float32).record()
    assert recorded == ["stream of cuda:1"]
