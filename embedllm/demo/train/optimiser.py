"""The optimiser and its schedule: Muon for the hidden matrices, AdamW for embeddings and norms.

The learning rate follows progress, a number from 0 to 1: a short rise, a short plateau, and a straight line to zero.
Progress comes from the clock, so the decay always completes inside the time given. It knows nothing of data.
"""

from __future__ import annotations

import torch
from torch import nn

WARM_UP = 0.01
DECAY_FROM = 0.2
MUON_RATE = 0.012
ADAM_RATE = 0.003


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimiser per kind of parameter; `initial_lr` holds the rate of the plateau."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("embed")]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or name.startswith("embed")]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95, nesterov=True),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def rate(progress: float) -> float:
    """The learning rate as a share of the plateau."""
    rise = min(1.0, (progress + 1e-4) / WARM_UP)
    fall = min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)))
    return rise * fall


def set_rate(made: list[torch.optim.Optimizer], progress: float) -> None:
    """Apply the schedule."""
    for optimiser in made:
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * rate(progress)
