"""Linear layers in 8-bit integers, for inference on a CPU."""

import warnings

import torch
from torch import nn


def quantize_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of a model, in place, by ones that compute in int8.

    Weights are rounded once, activations batch by batch (dynamic quantisation): there is nothing to calibrate. Biases,
    norms, softmax, convolutions, word embeddings and pooling by bare parameters stay in float32. The model can no
    longer be trained or saved: quantise after loading.

    Raises:
        ValueError: the model is not in float32 on the CPU, or this PyTorch has no such kernels.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        raise ValueError(
            f"int8 needs a model in float32 on the CPU, this one is {parameter.dtype} on {parameter.device}. On an "
            "accelerator take bfloat16, or the exported ONNX model."
        )
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise ValueError("this PyTorch has no torch.ao.quantization: export to ONNX with --int8 instead.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is to move to torchao
        quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
