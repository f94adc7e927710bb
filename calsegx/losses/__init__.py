"""Losses: pure functions ``loss(logits, labels, *, options) -> [B]``, one registered file each.

``logits`` are ``[B, *spatial, L]`` with any number of spatial axes; ``L = 1`` is a sigmoid (one foreground
class), ``L >= 2`` a softmax whose channel 0 is the background.  ``labels`` are class indices ``[B,
*spatial]``.  Everything is computed in float32, or in the logits' own precision where that is higher.
``fisher`` turns any of them into a penalised loss.
"""

from calsegx import interfaces
from calsegx.registry import Registry

registry: Registry[interfaces.Loss] = Registry("loss", "calsegx.losses")


def get(name: str) -> interfaces.Loss:
    """The loss called ``name``.

    Raises:
        UsageError: for an unknown name; the message lists the known ones.
    """
    return registry.get(name)


def names() -> list[str]:
    """The names of all losses, sorted."""
    return registry.names()
