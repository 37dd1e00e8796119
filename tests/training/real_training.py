"""Both models, a few numbers wide, through the loop with rows drawn from their keys; run as a script it is one process.

python real_training.py '{"output_dir": "...", "max_steps": 2}' fvlm [--resume]
"""

import argparse
import json
import sys

import torch
from transformers import BertConfig, SiglipVisionConfig

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.training import faults
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.calibration import CalibratedFVLMObjective, TextTeacher
from medclip_hf.training.distributed import gather_rows, num_processes, process_index
from medclip_hf.training.launch import end, make_accelerator
from medclip_hf.training.loop import train
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective
from medclip_hf.training.sharded import gathered

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 24}
ANATOMIES = ("lung", "heart", "aorta")
SIZE_DHW = (4, 8, 8)


def new_model(kind, dropout=0.0):
    torch.manual_seed(0)
    text = TEXT | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind.startswith("fvlm"):
        vision = SIZES | {"image_size_dhw": SIZE_DHW, "patch_size_dhw": (2, 4, 4)}
        vision |= {"hidden_dropout": dropout, "attention_dropout": dropout}
        config = FVLMConfig(
            text_config=text,
            vision_config=vision,
            anatomies=ANATOMIES,
            feature_layers=(0,),
            projection_dim=12,
            pooling_dropout=dropout,
        )
        return FVLMModel(config)
    config = ConceptCLIPConfig(
        text_config=BertConfig(**text).to_dict(),
        vision_config=SiglipVisionConfig(**SIZES, image_size=12, patch_size=4).to_dict(),
        use_patch_concept_alignment=kind == "conceptclip",
    )
    return ConceptCLIPModel(config)


class Keys:
    """The examples are their own keys; `collate_...` draws what they hold."""

    def __len__(self):
        return 24

    def __getitem__(self, key):
        return key


def texts_of(keys):
    """Token ids, mask and lengths, the longest text first, and the order that brings them there."""
    generators = [torch.Generator().manual_seed(1000 * epoch + index) for epoch, index in keys]
    lengths = torch.tensor([int(torch.randint(6, 24, (), generator=one)) for one in generators])
    lengths, order = lengths.sort(descending=True, stable=True)
    tokens = torch.stack([torch.randint(5, 50, (24,), generator=one) for one in generators])[order]
    mask = (torch.arange(int(lengths[0])) < lengths[:, None]).long()
    return {
        "input_ids": tokens[:, : mask.shape[1]] * mask,
        "attention_mask": mask,
        "text_lengths": lengths.tolist(),
    }, order


def images_of(keys, shape):
    generators = [torch.Generator().manual_seed(7 + 1000 * epoch + index) for epoch, index in keys]
    return torch.stack([torch.randn(shape, generator=one) for one in generators])


def collate_figures(keys):
    texts, order = texts_of(keys)
    keys = [keys[row] for row in order.tolist()]
    starts = torch.tensor([[1 + index % 3, 2] for _, index in keys])
    return texts | {
        "token_type_ids": torch.zeros_like(texts["input_ids"]),
        "pixel_values": images_of(keys, (3, 12, 12)),
        "concept_token_spans": torch.stack([starts, starts + 2], dim=-1),
        "concept_mask": torch.tensor([[True, index % 2 == 0] for _, index in keys]),
        "concept_ids": torch.tensor([[index % 5, index % 7] for _, index in keys]),
        "row_ids": [str(key) for key in keys],
        "set_aside": [],
    }


def collate_scans(keys):
    """One text an anatomy of each scan."""
    entries = [(epoch, 100 * index + place) for epoch, index in keys for place in range(len(ANATOMIES))]
    texts, order = texts_of(entries)
    mask = torch.zeros(len(keys), *SIZE_DHW, dtype=torch.uint8)
    for place in range(len(ANATOMIES)):
        mask[:, :, :, 2 * place : 2 * place + 3] = place + 1
    shape = (len(keys), len(ANATOMIES))
    return texts | {
        "pixel_values": images_of(keys, (1, *SIZE_DHW)),
        "anatomy_mask": mask,
        "text_ids": torch.tensor([entries[row][1] for row in order.tolist()]),
        "text_index": order.argsort().view(shape),
        "is_complete": torch.ones(shape, dtype=torch.bool),
        "is_abnormal": torch.tensor([[(index + place) % 2 == 0 for place in range(3)] for _, index in keys]),
        "row_ids": [str(key) for key in keys],
        "set_aside": [],
    }


def new_objective(kind, model):
    if kind == "fvlm-teacher":
        return CalibratedFVLMObjective(ANATOMIES, TextTeacher(model, 0.9), text_buckets=3)
    return FVLMObjective(ANATOMIES, text_buckets=3) if kind == "fvlm" else ConceptCLIPObjective()


def validate_unevenly(model, step):
    """Process r calls an fVLM r + 1 times, and reads a parameter outside of it."""
    batch = collate_scans([(0, 0), (0, 1)])
    with gathered(model):
        totals = [FVLMObjective(ANATOMIES).embed(model, batch)["text_embeds"].sum() for _ in range(process_index() + 1)]
        scaled = totals[-1] * model.logit_scale.exp()
    everyones = gather_rows(scaled.reshape(1), [1] * num_processes())
    return {"spread": float(everyones.max() - everyones.min())}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("kind", choices=["conceptclip", "conceptclip-1", "fvlm", "fvlm-teacher"])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--validate", action="store_true")
    options = parser.parse_args()
    faults.BEAT_SECONDS = 0.3
    arguments = RunArguments(progress_bar=False, **options.arguments)
    accelerator = make_accelerator(arguments)
    model = new_model(options.kind, options.dropout)
    collate = collate_scans if options.kind.startswith("fvlm") else collate_figures
    objective = new_objective(options.kind, model)
    evaluate_fn = validate_unevenly if options.validate else None
    result = train(
        model,
        Keys(),
        collate,
        objective,
        arguments,
        evaluate_fn=evaluate_fn,
        resume=options.resume,
        accelerator=accelerator,
    )
    end(accelerator)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
