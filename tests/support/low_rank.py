"""A layer with a low-rank adapter."""

from torch import nn


class LowRank(nn.Module):
    """A LoRA wrapper as peft writes them."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, given):
        return self.base_layer(given) + self.lora_B["default"](self.lora_A["default"](given))
