"""What a normalizer of one's own inherits from ``MomentNorm``, beyond ``nn.Module``: methods and attributes by name.

    python benchmarks/inherited_members.py

Counted are names that this package defines: methods and properties, those of ``nn.Module`` that it overrides included,
and attributes, declared or set on an instance. Names with an underscore in front are private.
"""

from __future__ import annotations

import inspect

from torch import nn

from lightning_norm import MomentNorm


def members() -> tuple[set[str], set[str]]:
    """Return the names of the methods and of the attributes."""
    classes = [cls for cls in MomentNorm.__mro__ if cls.__module__.startswith("lightning_norm")]
    names = {name for cls in classes for name in vars(cls) if not name.startswith("__")}
    declared = {name for cls in classes for name in inspect.get_annotations(cls)}
    layer = MomentNorm(8)
    instance = {*vars(layer), *layer._parameters, *layer._buffers} - {*vars(nn.Module())}
    methods = {name for name in names if inspect.isroutine(getattr(MomentNorm, name))}
    return methods, (names | declared | instance) - methods


def main() -> None:
    """Print both."""
    for kind, names in zip(("methods", "attributes"), members(), strict=True):
        public = sorted(name for name in names if not name.startswith("_"))
        print(f"{len(names)} {kind}, {len(public)} public: {', '.join(public)}")
        print(f"  private: {', '.join(sorted(names - set(public)))}")


if __name__ == "__main__":
    main()
