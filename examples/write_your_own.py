"""A normalizer of your own in 15 lines, in a network of torchvision: python examples/write_your_own.py."""

import torch
import torchvision
from torch.nn.functional import cross_entropy

import lightning_norm
from lightning_norm import Affine, MomentNorm, Moments


class HalfInstanceNorm(MomentNorm):
    """Half of the instance's, half of the batch's statistics."""

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the averaged statistics."""
        batch = self.track(m.over_batch())
        return self.standardize((m.mean + batch.mean) / 2, (m.var + batch.var) / 2)


def main() -> None:
    """Swap it in, take one training step, swap it out."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    report = lightning_norm.swap(model, HalfInstanceNorm)  # in YAML: norm: my_package.HalfInstanceNorm
    print(report)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    optimizer.step()
    print(f"\none step of training: loss {loss.item():.3f}, first layer {model.bn1}")

    report.undo()
    print(f"after undo: {model.bn1}")


if __name__ == "__main__":
    main()
