"""The statistics of a model's normalization layers: listed, taken out, put back, and averaged over clients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.recognize import is_norm
from lightning_norm.surgery.text_tables import TableReport
from lightning_norm.surgery.torch_private import TorchInstanceNormBase
from lightning_norm.surgery.walk import names_by_module

KINDS = {
    "mean": "mean, weighted by counts",
    "variance": "variance of all samples together, the spread between means included",
    "deviation": "root of that variance",
    "sample variance": "mean of each sample's variance, weighted by counts",
    "frequency": "mean, weighted by counts",
    "counter": "greatest",
    "fitted": "must be the same",
    "parameter": "mean, weighted by counts",
}
"""What a tensor is -> how it is averaged."""


class NormStatistics(TableReport, Mapping[str, Tensor]):
    """The tensors of :func:`norm_statistics`: name, as in the ``state_dict`` -> the model's own tensor.

    ``len``, ``in``, ``items()`` and ``print`` list them; see :meth:`take`, :meth:`put` and :meth:`average`. A server
    that averages clients builds the model as they do and never runs it:

    >>> server = norm_statistics(nn.BatchNorm2d(2))
    >>> one, other = server.take(), {**server.take(), "running_mean": torch.ones(2)}
    >>> server.average([one, other], counts=[100, 300])["running_mean"]
    tensor([0.7500, 0.7500])

    Args:
        layers: name -> normalization layer.
        personal: with the parameters.
    """

    def __init__(self, layers: Mapping[str, nn.Module], personal: bool) -> None:
        self.layers = dict(layers)
        self.kinds: dict[str, str] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for layer_name, layer in self.layers.items():
            for name, kind in _kinds(layer, personal).items():
                full = f"{layer_name}.{name}".removeprefix(".")
                self.kinds[full], self._places[full] = kind, (layer, name)

    def __getitem__(self, name: str) -> Tensor:
        layer, attribute = self._places[name]
        # Looked up now: FSDP, ``to`` and a second swap put other tensors in the layer.
        tensor: Tensor = _attribute(layer, attribute)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def take(self) -> dict[str, Tensor]:
        """Return copies, a plain dictionary that can be saved, sent, and compared."""
        return {name: tensor.detach().clone() for name, tensor in self.items()}

    def others(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what of a ``state_dict`` is not among these: what a client sends, if these are its own."""
        return {name: tensor for name, tensor in state_dict.items() if name not in self}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that were taken, of this model or of one like it; all of them or none.

        Raises:
            ValueError: a name is missing or unknown, or a shape is another one.
        """
        self._check(tensors, "these statistics")
        for name, tensor in tensors.items():
            self[name].copy_(tensor)

    @torch.no_grad()
    def average(self, clients: Sequence[Mapping[str, Tensor]], counts: Sequence[float]) -> dict[str, Tensor]:
        r"""Return the statistics of all clients together, as if one had seen all of their samples.

        .. math::
            \mu = \sum_i w_i \mu_i, \qquad \sigma^2 = \sum_i w_i (\sigma_i^2 + (\mu_i - \mu)^2), \qquad
            w_i = n_i / \textstyle\sum_j n_j

        Means and parameters are averaged by their counts, variances by the law of total variance, counters are the
        greatest. Each context of ``cn`` counts by how frequent it is on each client. Unbiased variances are averaged
        like biased ones, a relative error below 1 / n.

        Args:
            clients: what :meth:`take` returned on each.
            counts: samples behind each.

        Raises:
            ValueError: no client, counts that do not fit, a client with other tensors, or contexts that were fitted on
                each client by itself and mean different things.
        """
        if not clients or len(clients) != len(counts):
            raise ValueError(
                f"average: expected one count per client, got {counted(len(clients), 'client')}, "
                f"{counted(len(counts), 'count')}."
            )
        if any(not 0 <= n < math.inf for n in counts) or not sum(counts):
            raise ValueError(f"average: counts are numbers of samples, not all of them 0, got {list(counts)!r}.")
        for i, tensors in enumerate(clients):
            self._check(tensors, f"client {i}")
        result: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            prefix = f"{name}." if name else ""
            # Layer by layer, for a variance is averaged around the mean beside it.
            mine = {n.removeprefix(prefix): n for n, (owner, _) in self._places.items() if owner is layer}
            stacked = {n: torch.stack([tensors[full].cpu() for tensors in clients]) for n, full in mine.items()}
            kinds = {n: self.kinds[full] for n, full in mine.items()}
            means = _of_layer(name, stacked, kinds, torch.tensor(counts, dtype=torch.float64))
            for n, t in means.items():
                # As wide as the widest of the clients and of this model: what one has in whole numbers has a mean, too.
                dtype = torch.promote_types(stacked[n].dtype, self[mine[n]].dtype)
                result[mine[n]] = t.to(clients[0][mine[n]].device, dtype)
        return {name: result[name] for name in self}

    def _check(self, tensors: Mapping[str, Tensor], what: str) -> None:
        if missing := [name for name in self if name not in tensors]:
            number = counted(len(missing), "tensor of this model is", "tensors of this model are")
            raise ValueError(f"{what}: {number} missing, the first: {missing[0]!r}.")
        if unknown := [name for name in tensors if name not in self]:
            raise ValueError(
                f"{what}: this model has no {unknown[0]!r} among its statistics. Take them from a model that was "
                "swapped in the same way, with the same personal=."
            )
        for name, tensor in self.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"{what}: {name} is {tuple(tensors[name].shape)}, and {tuple(tensor.shape)} in this model."
                )

    def table(self) -> list[tuple[str, ...]]:
        """Return one row per tensor, below a heading."""
        rows: list[tuple[str, ...]] = [("tensor", "layer", "shape", "is a", "average over clients")]
        return rows + [
            (name, type(layer).__name__, str(tuple(self[name].shape)), self.kinds[name], KINDS[self.kinds[name]])
            for name, (layer, _) in self._places.items()
        ]

    def __repr__(self) -> str:
        return f"NormStatistics({counted(len(self), 'tensor')} of {counted(len(self.layers), 'layer')})"


def norm_statistics(model: nn.Module, personal: bool = False) -> NormStatistics:
    """List the statistics of a model's normalization layers; take them out, put them back, average them.

    Args:
        model: any module, wrapped or not: layers of this package, of torch, and of other libraries.
        personal: also all parameters of these layers, which with the statistics are what FedBN keeps on each client
            (Li et al., ICLR 2021, arXiv 2102.07623).

    >>> import lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> statistics = norm_statistics(model)
    >>> list(statistics)
    ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    >>> before = statistics.take()
    >>> _ = model(torch.randn(4, 3, 8, 8))
    >>> statistics.put(before)
    """
    layers = {names[0]: module for module, names in names_by_module(model).items() if is_norm(module)}
    # A normalization layer inside of another one, such as a wrapper by name, is listed once.
    inside = {child for module in layers.values() for child in module.modules() if child is not module}
    return NormStatistics({name: module for name, module in layers.items() if module not in inside}, personal)


def _kinds(layer: nn.Module, personal: bool) -> dict[str, str]:
    """Return the tensors of a layer's ``state_dict`` that are statistics, or all of them, and what they are."""
    names = getattr(layer, "running_names", ("running_mean", "running_var"))
    # An average of variances per sample holds no variance between means, and none is added to it.
    per_sample = isinstance(layer, TorchInstanceNormBase) or not getattr(layer, "_includes_between_var", True)
    variance = "sample variance" if per_sample else "deviation" if names[1] == "running_std" else "variance"
    known = {names[0]: "mean", names[1]: variance, "prior": "frequency", "running_spread": "variance"}
    parameters = {name for name, _ in layer.named_parameters()}
    kinds = {}
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if name in parameters:
            kind = "parameter"
        elif not tensor.is_floating_point():
            kind = "counter"
        else:
            # A float buffer of ours that is no statistic was fitted to data, such as centroids; elsewhere it is an
            # average.
            kind = known.get(name, "fitted" if isinstance(layer, Normalizer) else "mean")
        if personal or kind != "parameter":
            kinds[name] = kind
    return kinds


def _attribute(layer: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    owner = layer.get_submodule(path)
    tensor: Tensor = getattr(owner, last)
    return tensor


def _of_layer(name: str, stacked: Mapping[str, Tensor], kinds: Mapping[str, str], counts: Tensor) -> dict[str, Tensor]:
    """Return the averages of one layer's tensors, each (clients, ...), in float64 but for counters."""
    weights = counts / counts.sum()
    means: dict[str, Tensor] = {}
    # A context counts by its samples on each client: (clients, K, 1) in place of one weight for all.
    rows = _each_context(stacked["prior"], weights) if "prior" in stacked else weights
    center = next((n for n, kind in kinds.items() if kind == "mean"), "")
    for n, kind in kinds.items():
        t = stacked[n]
        if kind == "counter":
            means[n] = t.amax(0)
        elif kind == "fitted":
            if not bool((t == t[:1]).all()):
                raise ValueError(
                    f"average: {name}.{n} differs between clients: what was fitted on each by itself does not mean the "
                    "same. Fit it once, put it into every client, and average then."
                )
            means[n] = t[0]
        elif kind in ("parameter", "frequency"):
            means[n] = _weighted(t, weights)
        elif kind in ("mean", "sample variance") or not center:
            means[n] = _weighted(t, rows)
        else:
            # What varies within each client's data, and how far the clients lie apart.
            var = t.double().square() if kind == "deviation" else t.double()
            middle = stacked[center].double()
            pooled = _weighted(var + (middle - _weighted(middle, rows)).square(), rows)
            means[n] = pooled.sqrt() if kind == "deviation" else pooled
    return means


def _each_context(prior: Tensor, weights: Tensor) -> Tensor:
    mass = prior.double() * weights.unsqueeze(1)  # (clients, K)
    # A client's share of a context: how frequent it is there, times the samples of that client.
    total = mass.sum(0)
    # A context that no client has keeps the clients' own weights.
    return torch.where(total > 0, mass / total.clamp_min(1e-300), weights.unsqueeze(1)).unsqueeze(2)


def _weighted(t: Tensor, weights: Tensor) -> Tensor:
    shape = (*weights.shape, *(1,) * (t.dim() - weights.dim()))
    return (t.to(torch.float64) * weights.reshape(shape)).sum(0)
