"""The layers of the papers' authors in evaluation, written anew from their equations, and files as their code saves.

    python -m tests.published FOLDER

writes one file per layer. Names and shapes of parameters and buffers are those of the authors' files.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

F64 = torch.float64


def against(t, x):
    """One value per channel, in whatever shape, against x."""
    return t.reshape(1, -1, *(1,) * (x.dim() - 2))


class SN(nn.Module):
    """Luo et al.: ``axes`` spatial axes; unbiased variance within a sample, all else from it."""

    def __init__(self, c, axes=2, using_bn=True):
        super().__init__()
        ones = (1,) * axes
        self.choices = ["ln", "bn"] if not axes else ["in", "ln", "bn"] if using_bn else ["in", "ln"]
        self.weight, self.bias = (nn.Parameter(torch.empty(1, c, *ones)) for _ in range(2))
        self.mean_weight, self.var_weight = (nn.Parameter(torch.empty(len(self.choices))) for _ in range(2))
        if using_bn:
            for name in ("running_mean", "running_var"):
                self.register_buffer(name, torch.ones(1, c, *(1,) * bool(axes)))

    def weights(self):
        return torch.softmax(self.mean_weight, 0), torch.softmax(self.var_weight, 0)

    def forward(self, x):
        means, variances = [], []
        if x.dim() > 2:
            dims = list(range(2, x.dim()))
            mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True)
            layer = mean.mean(1, keepdim=True)
            of_layer = (var + mean**2).mean(1, keepdim=True) - layer**2
        else:
            mean = var = None
            layer, of_layer = x.mean(1, keepdim=True), x.var(1, keepdim=True)
        for choice in self.choices:
            batch = [against(t, x) for t in (self.running_mean, self.running_var)] if choice == "bn" else []
            pair = {"in": (mean, var), "ln": (layer, of_layer), "bn": batch}[choice]
            means.append(pair[0]), variances.append(pair[1])
        w, v = self.weights()
        center = sum(a * m for a, m in zip(w, means, strict=True))
        scale = (sum(a * s for a, s in zip(v, variances, strict=True)) + 1e-5).sqrt()
        return against(self.weight, x) * (x - center) / scale + against(self.bias, x)


class SparseSN(SN):
    """Shao et al.: sparsestmax, or the parameter itself once it is one-hot."""

    def __init__(self, c, radius=0.3, fixed=(0, 0)):
        super().__init__(c)
        self.register_buffer("radius", torch.tensor([radius]))
        self.register_buffer("mean_fixed", torch.tensor(fixed[:1]))
        self.register_buffer("var_fixed", torch.tensor(fixed[1:]))

    def weights(self):
        pairs = ((self.mean_weight, self.mean_fixed), (self.var_weight, self.var_fixed))
        return [z.detach() if fixed else sparsestmax(z.detach(), float(self.radius)) for z, fixed in pairs]


def on_the_simplex(z):
    """The nearest point of the simplex, found by trying every number of entries that stay positive."""
    ordered = sorted(z.tolist(), reverse=True)
    taus = [(sum(ordered[:k]) - 1) / k for k in range(1, len(ordered) + 1)]
    k = max(k for k, tau in enumerate(taus, 1) if ordered[k - 1] > tau)
    return (z - taus[k - 1]).clamp(min=0)


def sparsestmax(z, radius, centre=None):
    p = on_the_simplex(z)
    u = (p > 0).to(z) / (p > 0).sum()
    if centre is not None:
        radius = math.sqrt(max(radius**2 - float((u - centre).square().sum()), 0))
    distance = float((p - u).norm())
    if (p > 0).sum() == 1 or distance >= radius:
        return p
    p = u + radius * (p - u) / distance
    return sparsestmax(p, radius, u) if (p < 0).any() else p


class BNET(nn.BatchNorm2d):
    """Xu et al.: no affine, then a depthwise convolution with zeros around."""

    def __init__(self, c, k=3):
        super().__init__(c, affine=False)
        self.bnconv = nn.Conv2d(c, c, k, padding=k // 2, groups=c)

    def forward(self, x):
        scale = (against(self.running_var, x) + 1e-5).sqrt()
        return self.bnconv((x - against(self.running_mean, x)) / scale)


class RBN(nn.Module):
    """Gao et al.: centred by each sample's mean, gated by that of the normalized map."""

    def __init__(self, c):
        super().__init__()
        for name in ("weight", "bias", "center_weight", "scale_weight", "scale_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, c, 1, 1)))
        self.register_buffer("running_mean", torch.ones(c))
        self.register_buffer("running_var", torch.ones(c))
        self.register_buffer("num_batches_tracked", torch.tensor(7))

    def forward(self, x):
        centred = x + self.center_weight * x.mean((2, 3), keepdim=True)
        normalized = (centred - against(self.running_mean, x)) / (against(self.running_var, x) + 1e-5).sqrt()
        gate = torch.sigmoid(self.scale_weight * normalized.mean((2, 3), keepdim=True) + self.scale_bias)
        return self.weight * normalized * gate + self.bias


class BCN(nn.Module):
    """Khaled et al.: the running variance times m / (m - 1) of the batch at hand; half of the entries are unused."""

    def __init__(self, c):
        super().__init__()
        for name in ("BCN_var", "gamma", "beta"):
            self.register_parameter(name, nn.Parameter(torch.empty(c)))
        self.Batchh, self.layeer = nn.Module(), nn.Module()
        for name in ("runningmean", "runningvar"):
            self.Batchh.register_buffer(name, torch.ones(c))
        for inner in (self.Batchh, self.layeer):
            inner.gamma, inner.beta = nn.Parameter(torch.empty(c)), nn.Parameter(torch.empty(c))

    def forward(self, x):
        m = x.numel() / x.shape[1]
        var = against(self.Batchh.runningvar, x) * m / (m - 1)
        batch = (x - against(self.Batchh.runningmean, x)) / (var + 1e-5).sqrt()
        of_layer = x.var((1, 2, 3), unbiased=False, keepdim=True)
        layer = (x - x.mean((1, 2, 3), keepdim=True)) / (of_layer + 1e-5).sqrt()
        iota, gamma, beta = (against(t, x) for t in (self.BCN_var, self.gamma, self.beta))
        return gamma * (iota * batch + (1 - iota) * layer) + beta


class ASR(nn.Module):
    """The public code of Fan et al.: of each sample; eps inside the root."""

    over = (2, 3)

    def __init__(self, c):
        super().__init__()
        for name in ("mu", "sigma", "beta", "gamma"):
            self.register_parameter(f"lambda_{name}", nn.Parameter(torch.empty(1)))
        self.bias_beta, self.bias_gamma = nn.Parameter(torch.empty(c)), nn.Parameter(torch.empty(c))
        for name, hidden in (("standard", c // 2), ("rescale", c // 16)):
            self.add_module(f"{name}_encoder", empty_linear(c, hidden))
            for half in {"standard": ("mean", "std"), "rescale": ("beta", "gamma")}[name]:
                self.add_module(f"{name}_{half}_decoder", nn.Sequential(nn.ReLU(), empty_linear(hidden, c)))

    def std(self, x):
        return (x.var(self.over) + 1e-6).sqrt()

    def forward(self, x):
        mean, std = x.mean(self.over), self.std(x)
        encoded = self.standard_encoder(mean), self.standard_encoder(std)
        g_mean, g_std = torch.sigmoid(self.lambda_mu), torch.sigmoid(self.lambda_sigma)
        m = g_mean * self.standard_mean_decoder(encoded[0]) + (1 - g_mean) * mean
        d = g_std * torch.relu(self.standard_std_decoder(encoded[1])) + (1 - g_std) * std
        of_beta = torch.tanh(self.rescale_beta_decoder(self.rescale_encoder(mean)))
        of_gamma = torch.sigmoid(self.rescale_gamma_decoder(self.rescale_encoder(std)))
        beta, gamma = self.lambda_beta * of_beta + self.bias_beta, self.lambda_gamma * of_gamma + self.bias_gamma
        m, d, beta, gamma = (t.reshape(-1, x.shape[1], 1, 1) for t in (m, d, beta, gamma))
        return gamma * (x - m) / d + beta


class AFN(ASR):
    """The public code of Zhou et al.: of the test batch; eps beside the root."""

    over = (0, 2, 3)

    def std(self, x):
        return x.var(self.over).sqrt() + 1e-6


class CN(nn.Module):
    """Faye et al.: a BatchNorm per context, all of it times 1 / sqrt(prior)."""

    def __init__(self, c, priors=(0.2, 0.5, 0.3)):
        super().__init__()
        self.priors = priors
        self.context_norm_layers = nn.ModuleList(nn.BatchNorm2d(c, eps=1e-3) for _ in priors)
        self.ids = None

    def forward(self, x):
        rows = [
            self.context_norm_layers[k](row[None]) / self.priors[k] ** 0.5 for row, k in zip(x, self.ids, strict=True)
        ]
        return torch.cat(rows)


def empty_linear(c, hidden):
    """A linear layer of no units as well, which torch would warn of."""
    layer = nn.Linear(1, 1)
    layer.weight, layer.bias = nn.Parameter(torch.empty(hidden, c)), nn.Parameter(torch.empty(hidden))
    return layer


def trained(module, seed=0):
    """The module in float64 and evaluation, with random values in all that it holds; variances are positive."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.double().state_dict().items():
            if t.dtype != F64 or name.endswith("radius"):
                continue
            noise = torch.randn(t.shape, generator=g, dtype=F64)
            if name.endswith(("running_var", "runningvar", "bias_gamma")):
                noise = noise.abs() + 0.5
            t.copy_(0.7 * noise)
        for layer in module.modules():
            for kind in ("mean", "var"):
                if isinstance(layer, SparseSN) and getattr(layer, f"{kind}_fixed"):
                    getattr(layer, f"{kind}_weight").copy_(torch.eye(3, dtype=F64)[seed % 3])
    return module.eval()


LAYERS = {
    "sn": lambda c: SN(c),
    "sn without bn": lambda c: SN(c, using_bn=False),
    "sn 3d": lambda c: SN(c, 3),
    "sn 1d": lambda c: SN(c, 0),
    "sparse sn": lambda c: SparseSN(c),
    "sparse sn, decided": lambda c: SparseSN(c, 0.9, (1, 0)),
    "bnet": lambda c: BNET(c),
    "bnet 5x5": lambda c: BNET(c, 5),
    "rbn": RBN,
    "bcn": BCN,
    "asr": ASR,
    "afn": AFN,
    "cn": CN,
}
"""What a layer is called -> its class, for a number of channels."""


def write_files(folder, c=20):
    """A file per layer, which is the layer "0" of a network."""
    for name, make in LAYERS.items():
        torch.save({"state_dict": trained(nn.Sequential(make(c))).state_dict()}, Path(folder) / f"{name}.pth")


if __name__ == "__main__":
    write_files(sys.argv[1])
