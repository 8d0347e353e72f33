"""A low-rank adapter with the attributes that adapter libraries use."""

from __future__ import annotations

from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A linear layer and the adapters ``one`` and ``two``; one is active."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({n: nn.Linear(base_layer.in_features, 2, bias=False) for n in ("one", "two")})
        self.lora_B = nn.ModuleDict({n: nn.Linear(2, base_layer.out_features, bias=False) for n in ("one", "two")})
        self.scaling = {"one": 2.0, "two": 3.0}
        self._active_adapter = ["one"]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def delta(self, name: str) -> Tensor:
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]

    def merge(self) -> None:
        for name in self._active_adapter:
            self.base_layer.weight.data += self.delta(name).detach()
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.base_layer.weight.data -= self.delta(self.merged_adapters.pop()).detach()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self._disable_adapters or self.merged_adapters:
            return y
        for name in self._active_adapter:
            y = y + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return y
