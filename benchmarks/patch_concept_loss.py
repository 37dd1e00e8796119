"""Time and memory of PC-Align: the package's chunked loss, the plain formulation, and the floor of one matrix product.

    python benchmarks/patch_concept_loss.py --threads 2

The plain formulation materialises the (images x patches x concepts) similarities, takes their maximum over patches and
leaves the rest to autograd.
"""

import argparse

import torch
from loss_measurement import FLOOR, OURS, PLAIN, add_arguments, measure, unit_rows
from torch import Tensor
from torch.nn import functional as F

from medclip_hf.modeling.conceptclip.loss_conceptclip import patch_concept_alignment_loss


def plain_loss(patches: Tensor, concepts: Tensor, concept_to_image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula as one would write it down."""
    logits = scale * (patches @ concepts.T).max(dim=1).values + bias
    signs = torch.where(torch.arange(len(patches)).unsqueeze(1) == concept_to_image, 1.0, -1.0)
    return F.softplus(-signs * logits).sum() / len(concepts)


def floor(patches: Tensor, concepts: Tensor, *_: Tensor) -> None:
    """The one matrix product that no exact formulation can leave out."""
    with torch.no_grad():
        torch.matmul(patches.flatten(0, 1), concepts.T)


def main() -> None:
    """Parse the sizes and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--patches", type=int, default=729)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--concepts", type=int, default=385)
    add_arguments(parser)
    sizes = parser.parse_args()

    def make_inputs(num_images: int) -> tuple[Tensor, ...]:
        patches = unit_rows(num_images, sizes.patches, sizes.width, seed=0)
        concepts = unit_rows(sizes.concepts, sizes.width, seed=1)
        concept_to_image = torch.arange(sizes.concepts) * num_images // sizes.concepts
        scale, bias = torch.tensor([1 / 0.07], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
        return patches, concepts, concept_to_image, scale, bias

    measure({PLAIN: plain_loss, OURS: patch_concept_alignment_loss, FLOOR: floor}, make_inputs, sizes)


if __name__ == "__main__":
    main()
