"""The conformance suite: what every normalizer promises, as named functions.

    from lightning_norm.testing import checks

    @pytest.mark.parametrize("name", checks())
    def test_my_norm(name):
        checks()[name](MyNorm)  # or functools.partial(MyNorm, num_groups=3)

A check raises AssertionError and says what differs, by how much, and how much was allowed.
"""

from __future__ import annotations

from lightning_norm.testing import (
    declarations,
    frozen,
    gradients,
    graphs,
    in_models,
    inputs,
    layouts,
    masks,
    numerics,
    parallel,
    state,
    transforms,
)
from lightning_norm.testing.kit import REGISTRY, Check, Make

GROUPS = (
    layouts,
    gradients,
    numerics,
    inputs,
    declarations,
    state,
    frozen,
    in_models,
    graphs,
    transforms,
    masks,
    parallel,
)


def checks() -> dict[str, Check]:
    """Return every check by name; each takes a factory: from ``num_features`` and further arguments by name to a layer.

    The factory, a class or ``functools.partial`` of one, must travel by pickle: one check starts processes.
    """
    order = [group.__name__ for group in GROUPS]
    return dict(sorted(REGISTRY.items(), key=lambda item: order.index(item[1].__module__)))


def conform(make: Make) -> None:
    """Run every check.

    Raises:
        AssertionError: at the first check that fails, with its name.
    """
    for name, run in checks().items():
        try:
            run(make)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
