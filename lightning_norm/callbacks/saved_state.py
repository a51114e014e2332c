"""What a callback keeps in checkpoints; two callbacks that would share the place are told what to type."""

from __future__ import annotations

from typing import Any

from lightning_norm.callbacks.lightning_compat import callbacks_of, pl
from lightning_norm.errors import ConflictError


class SavedState:
    """Mixin: what ``saved_state`` returns stands in the checkpoint where that of ``state_dict`` would.

    Lightning refuses two callbacks that have one key and a ``state_dict`` while the Trainer is built, and does not say
    what to type. A callback with this mixin has none, and calls :func:`refuse_twins` in its ``setup``.
    """

    @property
    def state_key(self) -> str:
        """The key in the checkpoint, which differs between callbacks that may stand side by side."""
        return type(self).__qualname__

    def saved_state(self) -> dict[str, Any]:
        """Return what is to be kept, in plain types and tensors; empty for nothing."""
        return {}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take over what was kept."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the state."""
        if state := self.saved_state():
            checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read it."""
        if state := checkpoint["callbacks"].get(self.state_key):
            self.load_saved_state(state)


def refuse_twins(trainer: pl.Trainer, callback: SavedState, why: str) -> None:
    """Refuse a second callback of the same class and key.

    Args:
        trainer: with all callbacks.
        callback: one of them.
        why: what the two would do, and what to type instead.

    Raises:
        ConflictError: there is one.
    """
    twins = [c for c in callbacks_of(trainer) if isinstance(c, SavedState) and c.state_key == callback.state_key]
    if len(twins) > 1:
        raise ConflictError(f"{len(twins)} {type(callback).__name__}s {why}")
