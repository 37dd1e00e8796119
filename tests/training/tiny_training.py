"""A model, data and objective of a few numbers for tests of the loop; run as a script it is one training process.

python tiny_training.py '{"output_dir": "...", "max_steps": 8}' [--resume] [--step_seconds 0.1] [--no_dropout]
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import PreTrainedConfig, PreTrainedModel

from medclip_hf.training import faults
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.distributed import gather_counts, gather_rows, num_processes
from medclip_hf.training.launch import end, make_accelerator
from medclip_hf.training.loop import train


class TwoTowerConfig(PreTrainedConfig):
    model_type = "test-two-towers"


class TwoTowers(PreTrainedModel):
    """Two linear towers with dropout and a logit scale."""

    config: TwoTowerConfig
    config_class = TwoTowerConfig
    base_model_prefix = "two_towers"

    def __init__(self, config):
        super().__init__(config)
        self.image = torch.nn.Linear(6, 4)
        self.dropout = torch.nn.Dropout(0.2)
        self.text = torch.nn.Linear(6, 4)
        self.logit_scale = torch.nn.Parameter(torch.ones(1))
        self.logit_bias = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, left, right):
        image = torch.nn.functional.normalize(self.image(self.dropout(left)), dim=-1)
        text = torch.nn.functional.normalize(self.text(self.dropout(right)), dim=-1)
        return image, text, self.logit_scale.exp(), self.logit_bias

    def _init_weights(self, module):
        pass

    @torch.no_grad()
    def clamp_logit_scales_(self):
        self.logit_scale.clamp_(0, 3)


class Numbers:
    """Rows of a few numbers, drawn from the key; notes which keys were read. Row 13 holds a NaN if asked to."""

    def __init__(self, num_rows=24, with_nan=False):
        self.num_rows = num_rows
        self.with_nan = with_nan
        self.read = []

    def __len__(self):
        return self.num_rows

    def __getitem__(self, key):
        epoch, index = key
        self.read.append(key)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        left, noise = torch.randn(2, 6, generator=generator)
        if self.with_nan and index == 13:
            left = left * float("nan")
        return {"row_id": f"row-{index}", "left": left, "right": left + 0.3 * noise}


def collate(examples):
    return {
        "left": torch.stack([example["left"] for example in examples]),
        "right": torch.stack([example["right"] for example in examples]),
        "row_ids": [example["row_id"] for example in examples],
        "set_aside": [],
    }


def collate_without_row_5(examples):
    kept = [example for example in examples if example["row_id"] != "row-5"]
    dropped = [{"row_id": "row-5", "reason": "unreadable", "detail": ""}] * (len(examples) - len(kept))
    return collate(kept) | {"set_aside": dropped}


class Matching:
    """Each left row shall find its right row among those of all processes."""

    def split(self, batch, num_chunks):
        size = -(-len(batch["left"]) // num_chunks)
        keys = ("left", "right", "row_ids")
        return [{key: batch[key][start : start + size] for key in keys} for start in range(0, len(batch["left"]), size)]

    def embed(self, model, batch):
        image, text, scale, bias = model(batch["left"], batch["right"])
        return {"image": image, "text": text, "scale": scale, "bias": bias}

    def compare(self, embeddings, batch):
        device = embeddings["image"].device
        counts = [count for (count,) in gather_counts([len(embeddings["image"])], device)]
        rank = torch.distributed.get_rank() if num_processes() > 1 else 0
        text = gather_rows(embeddings["text"], counts)
        logits = embeddings["scale"].mean() * embeddings["image"] @ text.T
        target = torch.arange(len(logits), device=device) + sum(counts[:rank])
        logits = logits + embeddings["bias"].mean() * torch.nn.functional.one_hot(target, len(text))
        share = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / sum(counts)
        return {"loss": share * num_processes()}


def fault_at(kind, step, done):
    """An `embed` of process 1 that at one step dies, waits for ever or fails; not again once the file `done` exists."""
    count = 0

    def embed(model, batch):
        nonlocal count
        count += 1
        if count == step and os.environ.get("RANK") == "1" and not (done and done.exists()):
            if done:
                done.touch()
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "hang":
                time.sleep(3600)
            else:
                raise RuntimeError("a cosmic ray")
        return Matching.embed(None, model, batch)

    return embed


def fill_disk_from(step):
    """From this step on, the last process finds no space for its shards."""

    def write_data(*_):
        raise OSError(28, "No space left on device")

    class Filling(Matching):
        count = 0

        def embed(self, model, batch):
            Filling.count += 1
            if Filling.count == step and int(os.environ.get("RANK", 0)) == num_processes() - 1:
                HuggingFaceStorageWriter.write_data = write_data
            return super().embed(model, batch)

    return Filling()


def new_model(seed=0):
    torch.manual_seed(seed)
    return TwoTowers(TwoTowerConfig())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--step_seconds", type=float, default=0.0)
    parser.add_argument("--no_dropout", action="store_true")
    parser.add_argument("--fault", choices=["kill", "hang", "fail"])
    parser.add_argument("--fault_step", type=int, default=5)
    parser.add_argument("--fault_done", type=Path)
    parser.add_argument("--beat_seconds", type=float)
    parser.add_argument("--full_disk_from", type=int)
    parser.add_argument("--with_nan", action="store_true")
    options = parser.parse_args()

    objective = Matching()
    if options.step_seconds:
        objective.embed = lambda model, batch: (
            time.sleep(options.step_seconds) or Matching.embed(objective, model, batch)
        )
    if options.fault:
        objective.embed = fault_at(options.fault, options.fault_step, options.fault_done)
    if options.full_disk_from:
        objective = fill_disk_from(options.full_disk_from)
    if options.beat_seconds:
        faults.BEAT_SECONDS = options.beat_seconds
    arguments = RunArguments(progress_bar=False, **options.arguments)
    accelerator = make_accelerator(arguments)
    model = new_model()
    if options.no_dropout:
        model.dropout.p = 0.0
    fewer = int(os.environ.get("MEDCLIP_TEST_FEWER_ROWS", 0)) if os.environ.get("RANK") == "1" else 0
    result = train(
        model,
        Numbers(24 - fewer, with_nan=options.with_nan),
        collate_without_row_5,
        objective,
        arguments,
        resume=options.resume,
        accelerator=accelerator,
    )
    end(accelerator)
    if accelerator.is_main_process:
        print(json.dumps({key: str(value) for key, value in asdict(result).items()}))
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
