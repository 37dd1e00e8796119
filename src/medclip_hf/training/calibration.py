"""What corrects fVLM's targets for abnormal scans that are wrongly taken for negatives of each other.

Two ways, both without gradients of their own. `TextTeacher`: a moving average of the text tower tells how alike two
reports are. `PeerModel`: another fVLM, trained with another seed and data order, tells its own answers (co-teaching).
Normal scans need neither: they are positives of each other.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medclip_hf.training.objective_fvlm import FVLMObjective


class TextTeacher(nn.Module):
    """A moving average of the text tower; its similarities among abnormal texts become soft targets.

    Args:
        model: `FVLMModel`; its text tower and projection are copied.
        momentum: share of the old weights that stays at every step; 0.995 as in RADAR.
    """

    peer_weight = 0.0

    def __init__(self, model: Any, momentum: float = 0.995) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum is a share in [0, 1), but {momentum} came.")
        self.momentum = momentum
        self.text_model = copy.deepcopy(model.text_model)
        self.text_projection = copy.deepcopy(model.text_projection)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`teacher_text_embeds` (T, D), L2-normalised."""
        self.to(batch["input_ids"].device)
        states = self.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return {"teacher_text_embeds": F.normalize(self.text_projection(states.last_hidden_state[:, 0]), dim=-1)}

    @torch.no_grad()
    def after_step(self, model: Any) -> None:
        """Follow the model: new = momentum * old + (1 - momentum) * model."""
        for name in ("text_model", "text_projection"):
            own, followed = getattr(self, name).parameters(), getattr(model, name).parameters()
            for old, new in zip(own, followed, strict=True):
                old.lerp_(new.detach().to(old), 1 - self.momentum)

    def state_to_keep(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.state_dict()

    def continue_from(self, state: dict[str, Tensor]) -> None:
        """Take the averaged weights that `state_to_keep` gave."""
        self.load_state_dict(state)


class PeerModel(nn.Module):
    """Another fVLM whose answers are mixed into the targets of abnormal scans.

    The paper trains two models that correct each other in turn. Train one from another's newest weights, then that one
    from the new ones, and so on; within a turn the peer stays as it is.

    Args:
        peer: `FVLMModel` with the same anatomies, from another seed and data order.
        peer_weight: weight of its answers after the ramp; 0.5 as published (alpha = 0.5).
        ramp_steps: steps over which the weight grows from 0; two epochs in the release's unused code.
    """

    def __init__(self, peer: nn.Module, peer_weight: float = 0.5, ramp_steps: int = 0) -> None:
        super().__init__()
        if not 0.0 <= peer_weight <= 1.0 or ramp_steps < 0:
            raise ValueError(
                f"peer_weight is a share in [0, 1] and ramp_steps is not negative, but {peer_weight} and {ramp_steps} "
                "came."
            )
        self.peer = peer.requires_grad_(False).eval()
        self.final_peer_weight = peer_weight
        self.ramp_steps = ramp_steps
        self.steps_done = 0

    @property
    def peer_weight(self) -> float:
        """Weight of the peer's answers now."""
        share = 1.0 if self.ramp_steps == 0 else min(1.0, self.steps_done / self.ramp_steps)
        return self.final_peer_weight * share

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`peer_anatomy_embeds` (B, A, D), `peer_text_embeds` (T, D) and `peer_logit_scale` (1,)."""
        self.to(batch["input_ids"].device)
        outputs = self.peer(**batch, return_loss=False, return_logits=False)
        return {f"peer_{name}": outputs[name] for name in ("anatomy_embeds", "text_embeds", "logit_scale")}

    def after_step(self, model: Any) -> None:
        """Climb the ramp."""
        self.steps_done += 1

    def state_to_keep(self) -> dict[str, Tensor]:
        """How far the ramp is climbed; the peer's weights have their own folder."""
        return {"steps_done": torch.tensor(self.steps_done)}

    def continue_from(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_to_keep` was."""
        self.steps_done = int(state["steps_done"])


class CalibratedFVLMObjective(FVLMObjective):
    """`FVLMObjective` with a calibration whose state the loop keeps in its checkpoints.

    Args:
        anatomies: names of the model's anatomies, for the log.
        calibration: corrects the targets of abnormal scans.
        text_buckets: as there; the calibration's own texts are encoded in one group.
    """

    calibration: TextTeacher | PeerModel

    def __init__(
        self, anatomies: Sequence[str], calibration: TextTeacher | PeerModel, *, text_buckets: int = 1
    ) -> None:
        super().__init__(anatomies, calibration, text_buckets=text_buckets)

    def after_step(self, model: nn.Module) -> None:
        """Follow the unwrapped model after its optimiser step."""
        self.calibration.after_step(model)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the teacher's weights, or how far the ramp is."""
        return self.calibration.state_to_keep()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what a checkpoint kept."""
        self.calibration.continue_from(state)
