"""The Triton kernel gives what the chunked search gives: in Triton's interpreter, or compiled for a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from medclip_hf.modeling.conceptclip import patch_search_triton as kernel
from medclip_hf.modeling.conceptclip.loss_conceptclip import best_patch_similarity

# (images, patches, concepts, width): below, at and above the blocks of the kernel
SHAPES = [(2, 10, 5, 7), (1, 64, 64, 64), (2, 70, 65, 80), (2, 1, 1, 3), (2, 5, 0, 4), (0, 5, 3, 4)]

DTYPES = (torch.float32, torch.float16)  # the interpreter cannot multiply bfloat16

IN_INTERPRETER = """
import sys, torch
from medclip_hf.modeling.conceptclip.loss_conceptclip import best_patch_similarity
inputs, path = torch.load(sys.argv[1], weights_only=True), sys.argv[2]
found = []
for patches, concepts in inputs:
    patches.requires_grad_(), concepts.requires_grad_()
    values, indices = best_patch_similarity(patches, concepts)
    values.square().sum().backward()
    found.append((values.detach(), indices, patches.grad, concepts.grad))
torch.save(found, path)
"""


def draw(shape, dtype):
    images, patches, concepts, width = shape
    torch.manual_seed(0)
    drawn = torch.randn(images, patches, width), torch.randn(concepts, width)
    return tuple(F.normalize(tensor, dim=-1).to(dtype) for tensor in drawn)


def draw_awkward():
    """Inputs with strides, and with every patch there twice: in another block, and beside itself."""
    patches, concepts = draw((2, 70, 5, 12), torch.float32)
    strided = patches.transpose(1, 2).contiguous().transpose(1, 2), concepts.T.contiguous().T
    twice = patches[:, [*range(35), *range(35)]]
    return [strided, (twice, concepts.clone()), (patches[:, :9].repeat_interleave(2, 1), concepts.clone())]


def test_value_patch_and_gradients_are_those_of_the_chunked_search(tmp_path):
    inputs = [draw(shape, dtype) for shape in SHAPES for dtype in DTYPES] + draw_awkward()
    torch.save(inputs, tmp_path / "inputs")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_INTERPRETER, tmp_path / "inputs", tmp_path / "found"]
    subprocess.run(command, env=environment, check=True, timeout=300)
    for (patches, concepts), found in zip(inputs, torch.load(tmp_path / "found", weights_only=True), strict=True):
        patches, concepts = patches.requires_grad_(), concepts.requires_grad_()
        # In half precision the plain search takes products of half precision; the kernel sums them in float32.
        values, indices = best_patch_similarity(patches.float(), concepts.float())
        values.square().sum().backward()
        torch.testing.assert_close(found[0], values.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[1], indices)
        tolerance = 1e-5 if patches.dtype == torch.float32 else 5e-3
        torch.testing.assert_close(found[2], patches.grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found[3], concepts.grad, rtol=tolerance, atol=tolerance)


def test_the_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    entered, launched_on = [], []

    class Device:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *_):
            entered.clear()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: launched_on.append((grid, bool(entered)))

    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: Device())
    monkeypatch.setattr(kernel, "_search", Kernel())
    kernel.search_best_patches(*draw((3, 2, 65, 4), torch.float32), torch.float32)
    assert launched_on == [((6,), True)]  # two blocks of concepts for each of three images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_kernel_gives_the_best_patch(dtype):
    patches, concepts = (tensor.cuda() for tensor in draw((4, 729, 70, 1152), dtype))
    assert kernel.can_search(patches)
    values, _ = best_patch_similarity(patches, concepts)
    expected = torch.einsum("bpd,nd->bpn", patches.float(), concepts.float()).amax(1)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)
