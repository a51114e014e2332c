"""Average the weights of a training and give them statistics of their own: python examples/recalibrate.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import lightning_norm


def main() -> None:
    """Train on scikit-learn's digits, average the weights, and compare with and without recalibration."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    target = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    )
    lightning_norm.swap(model, "sn")
    averaged = AveragedModel(model)  # averages parameters; its running statistics stay those of the beginning
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for batch in train[torch.randperm(len(train))].split(50):
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), target[batch]).backward()
        optimizer.step()
        averaged.update_parameters(model)

    def accuracy() -> float:
        averaged.eval()
        with torch.no_grad():
            return (averaged(x[test]).argmax(1) == target[test]).float().mean().item()

    print(f"test accuracy of the averaged weights: {accuracy():.3f}")
    print(lightning_norm.recalibrate(averaged, x[train].split(100)))
    print(f"with statistics of their own: {accuracy():.3f}")


if __name__ == "__main__":
    main()
