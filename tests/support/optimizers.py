"""Optimizers of torch by name, each made from a list of parameters."""

from __future__ import annotations

from typing import Any

import torch

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda own: torch.optim.SGD(own, 0.1),
    "momentum and decay": lambda own: torch.optim.SGD(own, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam and decay": lambda own: torch.optim.Adam(own, 1e-2, weight_decay=0.1),
    "AdamW": lambda own: torch.optim.AdamW(own, 1e-2, weight_decay=0.1),
    "AdamW fused": lambda own: torch.optim.AdamW(own, 1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda own: torch.optim.AdamW(own, 1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "RMSprop": lambda own: torch.optim.RMSprop(own, 1e-2, momentum=0.9, weight_decay=0.1, centered=True),
    "Adagrad": lambda own: torch.optim.Adagrad(own, 1e-1, weight_decay=0.1),
    "L-BFGS": lambda own: torch.optim.LBFGS(own, 1e-2, max_iter=3),
}
