"""LoRALinear in a plain training loop: a network that knows the digits 0 to 4 learns 5 to 9 through adapters.

pip install torch-fused-lora scikit-learn
python examples/without_peft.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from torch_fused_lora import LoRALinear


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 200) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained {sum(p.numel() for p in parameters)} parameters, last loss {loss.item():.3f}")


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    return f"{(model(x).argmax(1) == y).double().mean().item():.1%}"


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
held_out = torch.rand(len(x)) < 0.25
old, new, test = (y < 5) & ~held_out, (y >= 5) & ~held_out, (y >= 5) & held_out

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
train(model, x[old], y[old])
print(f"digits 5 to 9, before: {accuracy(model, x[test], y[test])}")

for name, layer in list(model.named_children()):
    if isinstance(layer, nn.Linear):
        setattr(model, name, LoRALinear.from_linear(layer, r=8, lora_alpha=16, lora_dropout=0.05))
train(model, x[new], y[new])

model.eval()
print(f"digits 5 to 9, after: {accuracy(model, x[test], y[test])}")
adapted = model(x)
for layer in model:
    if isinstance(layer, LoRALinear):
        layer.merge()
torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)  # W + s B A is rounded to float32 once more
print(f"digits 5 to 9, merged: {accuracy(model, x[test], y[test])}")
