"""Swap, train, save and load without any Trainer: python examples/plain_pytorch.py."""

import io

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import lightning_norm


def network() -> nn.Module:
    """Return a small convolutional network with two BatchNorm layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def main() -> None:
    """Train switchable normalization on scikit-learn's digits for two epochs."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    target = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]

    model = network()
    print(lightning_norm.swap(model, "sn"))  # before the optimizer: the new parameters are in it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        for batch in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[batch]), target[batch])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == target[test]).float().mean()
    print(f"test accuracy {accuracy:.3f}")
    for name, layer in model.named_modules():
        if isinstance(layer, lightning_norm.SwitchableNorm):
            weights = {k: [round(v, 2) for v in w.tolist()] for k, w in layer.importance().items()}
            print(f"layer {name}: importance of {layer.choices}: {weights}")

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = network()
    lightning_norm.swap(again, "sn")
    again.load_state_dict(torch.load(file))
    again.eval()
    with torch.no_grad():
        print(f"the same after loading: {torch.equal(again(x[test]), model(x[test]))}")


if __name__ == "__main__":
    main()
