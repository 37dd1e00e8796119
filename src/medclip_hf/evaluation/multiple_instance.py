"""Attention over the tiles of a slide: which class the slide is, and which tiles told (Ilse et al., "ABMIL", 2018)."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from medclip_hf.evaluation.metrics import auroc

logger = logging.getLogger(__name__)

Bag = tuple[Callable[[], Tensor], int]  # how to get the features (N, D) of a slide, and its class


@dataclass(frozen=True)
class MILSettings:
    """Sizes and training of an attention classifier; the defaults are those of ConceptCLIP's evaluation.

    Args:
        hidden_dim: of the tiles after a linear layer and ReLU.
        attention_dim: inside the attention.
        dropout: on the hidden tiles.
        gated: multiply the attention's tanh by a sigmoid gate; False as published.
        learning_rate: of Adam, falling to 0 by a cosine over the epochs.
        weight_decay: of Adam.
        num_epochs: at most.
        patience: epochs without a better validation until the training ends.
    """

    hidden_dim: int = 512
    attention_dim: int = 128
    dropout: float = 0.25
    gated: bool = False
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    num_epochs: int = 50
    patience: int = 10

    def __post_init__(self) -> None:
        if min(self.hidden_dim, self.attention_dim, self.num_epochs, self.patience) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"sizes, epochs and patience must be at least 1 and dropout in [0, 1), got {self}.")


class AttentionMIL(nn.Module):
    """Tiles (N, D) of one slide → logits of the classes and the attention on each tile.

    With h = dropout(relu(W x)): a = softmax(w · tanh(V h)), or softmax(w · (tanh(V h) * sigmoid(U h))) if gated; the
    slide is the sum of a_n h_n, and a linear layer tells its class.

    Args:
        in_dim: of a tile's features.
        class_names: in the order of the logits.
        settings: sizes.
        encoder_identity: of the features it is trained on, kept in its file.
    """

    def __init__(
        self, in_dim: int, class_names: Sequence[str], settings: MILSettings, encoder_identity: str = ""
    ) -> None:
        super().__init__()
        self.in_dim, self.class_names, self.settings = in_dim, tuple(class_names), settings
        self.encoder_identity = encoder_identity
        self.hidden = nn.Linear(in_dim, settings.hidden_dim)
        self.content = nn.Linear(settings.hidden_dim, settings.attention_dim)
        self.gate = nn.Linear(settings.hidden_dim, settings.attention_dim) if settings.gated else None
        self.attention = nn.Linear(settings.attention_dim, 1)
        self.classifier = nn.Linear(settings.hidden_dim, len(self.class_names))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K,) and attention (N,), which sums to 1.

        Raises:
            ValueError: features of another shape, or none.
        """
        if features.ndim != 2 or features.shape[1] != self.in_dim or not len(features):
            raise ValueError(
                f"features should be (N, {self.in_dim}) of at least one tile, got {tuple(features.shape)}."
            )
        hidden = F.dropout(F.relu(self.hidden(features)), self.settings.dropout, self.training)
        inner = self.content(hidden).tanh()
        if self.gate is not None:
            inner = inner * self.gate(hidden).sigmoid()
        attention = self.attention(inner).squeeze(-1).softmax(dim=0)
        return self.classifier(attention @ hidden), attention

    def save(self, path: str | Path) -> None:
        """Write weights, sizes and class names to one safetensors file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "in_dim": self.in_dim,
            "class_names": self.class_names,
            "settings": asdict(self.settings),
            "encoder_identity": self.encoder_identity,
        }
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()},
            temporary,
            {"attention_mil": json.dumps(facts)},
        )
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionMIL":
        """The classifier of a file, in evaluation mode.

        Raises:
            ValueError: the file is none that `save` wrote.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["attention_mil"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            model = cls(
                facts["in_dim"], facts["class_names"], MILSettings(**facts["settings"]), facts["encoder_identity"]
            )
            model.load_state_dict(weights)
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no file of an attention classifier: {error}") from error
        return model.eval()


@dataclass(frozen=True)
class MILPrediction:
    """Of one slide: probabilities (K,) and the attention (N,) on its tiles."""

    probabilities: NDArray[np.float64]
    attention: NDArray[np.float64]


def train_mil(
    train: Sequence[Bag],
    validation: Sequence[Bag],
    class_names: Sequence[str],
    settings: MILSettings,
    *,
    seed: int = 1,
    device: str | torch.device = "cpu",
    encoder_identity: str = "",
) -> tuple[AttentionMIL, list[dict[str, float]]]:
    """The classifier of the epoch with the best macro AUROC on the validation slides, and what every epoch gave.

    Of epochs with equal areas it is the one with the lowest validation loss.

    One slide a step, all in another order every epoch; equal seeds give equal weights on a CPU.

    Args:
        train: slides trained on.
        validation: slides that choose the epoch; never those that are reported.
        class_names: in the order of the bags' classes.
        settings: of sizes and training.
        seed: of weights, dropout and order.
        device: where it is trained.
        encoder_identity: kept in the classifier.

    Raises:
        ValueError: no slides, a class that the training slides lack, or validation slides of one class alone.
    """
    _check_bags(train, validation, class_names)
    order = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AttentionMIL(train[0][0]().shape[1], class_names, settings, encoder_identity).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_epochs)
        best: dict[str, Any] | None = None
        best_value, best_epoch = (-1.0, 0.0), 0
        history: list[dict[str, float]] = []
        for epoch in range(settings.num_epochs):
            loss = _train_epoch(model, optimizer, [train[place] for place in order.permutation(len(train))])
            schedule.step()
            found, labels = predict_slides(model, validation), [label for _, label in validation]
            area, validation_loss = macro_auroc(found, labels), mean_loss(found, labels)
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": loss,
                    "validation_auroc": area,
                    "validation_loss": validation_loss,
                }
            )
            # Few slides give few different areas, and the first epoch that has the best one has learned little.
            if (area, -validation_loss) > best_value:
                best, best_value, best_epoch = copy.deepcopy(model.state_dict()), (area, -validation_loss), epoch
            elif epoch - best_epoch >= settings.patience:
                break
    assert best is not None  # num_epochs is at least 1, and an AUROC above -1
    model.load_state_dict(best)
    logger.info("seed %d: validation AUROC %.4f at epoch %d of %d", seed, best_value[0], best_epoch + 1, len(history))
    return model.eval(), history


@torch.no_grad()
def predict_slides(model: AttentionMIL, bags: Sequence[Bag]) -> list[MILPrediction]:
    """Probabilities and attention of every slide; the model is put into evaluation mode for the time."""
    was_training, device = model.training, model.classifier.weight.device
    model.eval()
    found = []
    for features, _ in bags:
        logits, attention = model(features().float().to(device))
        found.append(MILPrediction(logits.double().softmax(dim=-1).cpu().numpy(), attention.double().cpu().numpy()))
    model.train(was_training)
    return found


def macro_auroc(predictions: Sequence[MILPrediction], labels: Sequence[int]) -> float:
    """Mean over the classes that the labels hold of each class's AUROC against the rest."""
    scores, truth = np.stack([found.probabilities for found in predictions]), np.asarray(labels)
    values = [auroc(scores[:, k], truth == k) for k in range(scores.shape[1])]
    known = [value for value in values if value is not None]
    return float(np.mean(known))


def mean_loss(predictions: Sequence[MILPrediction], labels: Sequence[int]) -> float:
    """Mean cross-entropy of the right classes."""
    right = [found.probabilities[label] for found, label in zip(predictions, labels, strict=True)]
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def _train_epoch(model: AttentionMIL, optimizer: torch.optim.Optimizer, bags: Sequence[Bag]) -> float:
    """Mean loss of one pass over the slides."""
    model.train()
    device, total = model.classifier.weight.device, 0.0
    for features, label in bags:
        logits, _ = model(features().float().to(device))
        loss = F.cross_entropy(logits, torch.tensor(label, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return total / len(bags)


def _check_bags(train: Sequence[Bag], validation: Sequence[Bag], class_names: Sequence[str]) -> None:
    known = set(range(len(class_names)))
    strange = {label for _, label in (*train, *validation)} - known
    if strange:
        raise ValueError(f"labels {sorted(strange)} are no places in the classes {list(class_names)}.")
    if lacking := [class_names[k] for k in sorted(known - {label for _, label in train})]:
        raise ValueError(f"no training slide is of the classes {lacking}: nothing can be learned of them.")
    if len({label for _, label in validation}) < 2:
        raise ValueError(
            f"the {len(validation)} validation slides are of fewer than two classes: no AUROC can choose the epoch."
        )
