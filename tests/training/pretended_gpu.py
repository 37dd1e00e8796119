"""A GPU that is not there: tensors say "cuda", are computed on the CPU, and refuse to meet tensors of other devices.

    python tests/training/pretended_gpu.py FOLDER

Runs steps of both models on it and prints, as JSON, what went wrong in each and where the host waited for the device.
PyTorch needs two things of a CUDA build for that: a guard, so that autograd knows the device, and the hooks that say it
is there. Both do nothing, and are compiled into FOLDER. They have to be loaded before PyTorch looks for the real ones.
Autocast and autograd are PyTorch's own for CUDA; kernels, streams and memory are not tried.
"""

import ctypes
import json
import subprocess
import sys
import traceback
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

TORCH = Path(find_spec("torch").origin).parent
GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device; using c10::DeviceIndex; using c10::Stream;
namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device) const override { return {CUDA, 0}; }
  Device getDevice() const override { return {CUDA, 0}; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 2; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
namespace pretended {
using at::CUDAHooksInterface; using at::CUDAHooksRegistry; using at::RegistererCUDAHooksRegistry;
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 2; }
  int getNumGPUs() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def build(folder):
    """The guard as a library."""
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    command = [
        "g++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-O0",
        f"-I{TORCH / 'include'}",
        str(source),
        "-o",
        str(library),
    ]
    links = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    subprocess.run(command + links, check=True)
    return library


ctypes.CDLL(str(build(Path(sys.argv[1]))))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step_models  # noqa: E402

from medclip_hf.modeling.conceptclip import loss_conceptclip  # noqa: E402
from medclip_hf.training.calibration import CalibratedFVLMObjective, TextTeacher  # noqa: E402
from medclip_hf.training.gradients import backward  # noqa: E402
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective  # noqa: E402

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
DEVICE = torch.device("cuda", 1)  # the current one is 0, so that "cuda" without a number is found as well
stops = Counter()


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU; `values` has its numbers."""

    @staticmethod
    def __new__(cls, values, index):
        """Of the shape and type of the values."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("cuda", index),
        )
        made.values_, made.number = values, index
        return made

    def __init__(self, values, index):
        pass

    def __deepcopy__(self, memo):
        copy = OnGPU(self.values_.clone(), self.number).requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        return copy

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """What the mode does, where there is none."""
        return compute(operation, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Creates tensors on the GPU, and computes where they are."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Every operation passes here."""
        return compute(operation, args, kwargs or {})


def plain(value):
    return value.values_ if isinstance(value, OnGPU) else value


def put(value, index):
    return OnGPU(value, index) if isinstance(value, torch.Tensor) and not isinstance(value, OnGPU) else value


def compute(operation, args, kwargs):
    """The result on the CPU, put on the device it would be on; an error where devices meet that must not."""
    name, device = operation.overloadpacket.__name__, kwargs.get("device")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [value for value in tensors if isinstance(value, OnGPU)]
    if device is None and not ours:
        return operation(*args, **kwargs)
    place = torch.device(device) if device is not None else ours[0].device
    if ours:
        note_stop(name, args, place)
    if name != "copy_" and device is None:
        strangers = [value for value in tensors if value.device != place and (value.dim() or value.is_cuda)]
        if strangers:
            raise RuntimeError(f"{operation} of a tensor on {place} and one {tuple(strangers[0].shape)} elsewhere")
    if name == "_fused_sdp_choice":
        return 0  # attention spelled out
    on_cpu = {key: torch.device("cpu") if key == "device" else plain(value) for key, value in kwargs.items()}
    found = operation(*tree_map(plain, args), **tree_map(plain, on_cpu))
    if operation._schema.is_mutable and name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]  # computed in place
    if name == "_to_copy" and found is plain(args[0]):
        found = found.clone()
    return tree_map(lambda value: put(value, place.index or 0), found) if place.type == "cuda" else found


def note_stop(name, args, place):
    """Count what makes the host wait, by name."""
    indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if name in WAITS or is_mask:
        stops[name] += 1
    if name == "_to_copy" and place.type == "cpu":
        stops["copy to the CPU"] += 1


def search_like_the_kernel(patches, concepts, product_dtype):
    found = loss_conceptclip._search_by_chunks(plain(patches.detach()), plain(concepts.detach()), product_dtype)
    return tuple(OnGPU(value, patches.number) for value in found)


def start_pretending():
    """From here on there are two GPUs."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    PretendedGPU().__enter__()


def train(model, batch, objective, *, bf16, micro_batches=1, use_kernel=False):
    """An optimiser step of the loop: transfer, forward, losses, backward, clipping, update, clamping."""
    loss_conceptclip.can_search = lambda _: use_kernel
    loss_conceptclip.search_best_patches = search_like_the_kernel
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = DEVICE
    batch = to_device(batch)
    stops.clear()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        values = backward(model, objective, batch, micro_batches, accelerator)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    counted = dict(stops)
    model.clamp_logit_scales_()
    if hasattr(objective, "after_step"):
        objective.after_step(model)
    assert values["loss"].isfinite().item()
    return counted


def to_device(batch):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def conceptclip(**how):
    model = step_models.conceptclip_model("tiny").to(DEVICE)
    batch = step_models.conceptclip_batch(model.config, 8)
    batch["pixel_values"] = (255 * batch["pixel_values"]).to(torch.uint8)
    batch["pixel_scaling"] = torch.full((8, 2, 3), 127.5)
    return train(model, batch, ConceptCLIPObjective(), **how)


def fvlm(*, is_calibrated=False, **how):
    model = step_models.fvlm_model("tiny").to(DEVICE)
    batch = step_models.fvlm_batch(model.config, 4)
    batch["pixel_values"] = (1000 * batch["pixel_values"]).to(torch.int16)
    batch["pixel_scaling"] = torch.tensor([[-500.0], [1000.0]]).repeat(4, 1, 1)
    anatomies = model.config.anatomies
    objective = (
        CalibratedFVLMObjective(anatomies, TextTeacher(model), text_buckets=3)
        if is_calibrated
        else FVLMObjective(anatomies)
    )
    return train(model, batch, objective, **how)


def models_alone(dtype=torch.bfloat16):
    """Losses of the models themselves, of weights in bfloat16 and the fewest inputs, and what else they compute."""
    model = step_models.conceptclip_model("tiny").to(DEVICE, dtype)
    batch = to_device(step_models.conceptclip_batch(model.config, 3))
    images, texts = batch["pixel_values"].to(dtype), batch["input_ids"]
    model(pixel_values=images, input_ids=texts, return_loss=True).loss.backward()
    model(images.new_zeros(1, 1).long(), images.new_zeros(1, 3, 48, 64), interpolate_pos_encoding=True)
    model.get_concept_maps(images, texts)
    model = step_models.fvlm_model("tiny").to(DEVICE, dtype)
    batch = to_device(step_models.fvlm_batch(model.config, 3))
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    names = ("input_ids", "pixel_values", "anatomy_mask", "is_abnormal", "text_index")
    model(**{name: batch[name] for name in names}, return_loss=True).loss.backward()
    model(pixel_values=batch["pixel_values"][..., :32], anatomy_mask=batch["anatomy_mask"][..., :32])


def mix_devices():
    return torch.ones(2, device=DEVICE) + torch.ones(2)


SCENARIOS = {
    "ConceptCLIP": partial(conceptclip, bf16=True, use_kernel=True),
    "ConceptCLIP, float32": partial(conceptclip, bf16=False),
    "ConceptCLIP, 4 micro-batches": partial(conceptclip, bf16=True, micro_batches=4),
    "fVLM": partial(fvlm, bf16=True),
    "fVLM, 4 micro-batches": partial(fvlm, bf16=True, micro_batches=4),
    "fVLM, calibrated": partial(fvlm, bf16=True, is_calibrated=True),
    "models alone": models_alone,
    "devices mixed": mix_devices,
}


def main():
    start_pretending()
    errors, waits = {}, {}
    for name, run in SCENARIOS.items():
        try:
            found = run()
            waits[name] = found if isinstance(found, dict) else {}
        except Exception as error:
            where = [f"{Path(line.filename).name}:{line.lineno}" for line in traceback.extract_tb(error.__traceback__)]
            errors[name] = f"{type(error).__name__}: {error} ({' < '.join(where[:-4:-1])})"
    print(json.dumps({"errors": errors, "waits": waits}))


if __name__ == "__main__":
    main()
