"""Time and memory of IT-Align: the package's chunked loss, the plain formulation, and the floor of three products.

    python benchmarks/image_text_loss.py --threads 2

The plain formulation materialises the (images x texts) logits and leaves the rest to autograd. Unlike PC-Align every
pair has a gradient, so three matrix products are the least that value and gradients cost. The package's memory beyond a
chunk of logits is one more copy of the two gradients.
"""

import argparse

import torch
from loss_measurement import FLOOR, OURS, PLAIN, add_arguments, measure, unit_rows
from torch import Tensor
from torch.nn import functional as F

from medclip_hf.modeling.conceptclip.loss_conceptclip import image_text_alignment_loss


def plain_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula as one would write it down."""
    logits = scale * images @ texts.T + bias
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def floor(images: Tensor, texts: Tensor, *_: Tensor) -> None:
    """The products of a forward and a backward pass, and nothing between them."""
    with torch.no_grad():
        logits = images @ texts.T
        torch.matmul(logits, texts)
        torch.matmul(logits.T, images)


def main() -> None:
    """Parse the sizes and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1152)
    add_arguments(parser)
    sizes = parser.parse_args()

    def make_inputs(num_images: int) -> tuple[Tensor, ...]:
        images, texts = (unit_rows(num_images, sizes.width, seed=seed) for seed in (0, 1))
        return images, texts, torch.tensor([1 / 0.07], requires_grad=True), torch.tensor([-10.0], requires_grad=True)

    measure({PLAIN: plain_loss, OURS: image_text_alignment_loss, FLOOR: floor}, make_inputs, sizes)


if __name__ == "__main__":
    main()
