"""Post-hoc calibrators: fitted on source validation voxels, applied to logits; one registered file each.

A calibrator is a registered object with

* ``fit(logits, labels, *, options) -> params`` (plain JSON values) of arrays, or ``fit(chunks, *, options)`` of a
  stream of them: reads the voxels once, in any chunking, and keeps a uniform sample of at most ``max_voxels``, so that
  memory does not grow with the data.  The region is the caller's, who passes its voxels only, ``logits [n, L], labels
  [n]``; a spatial calibrator gets whole images and a mask, ``logits [n, *spatial, L], labels [n, *spatial], image [n,
  *spatial, C], region bool [n, *spatial]``.
* ``apply(params, logits, image=None) -> logits`` of the same shape, numpy or jax.
* ``spatial``: which of the two it is.

``storage`` saves and loads params and refuses test subjects.
"""

from typing import Any

from calsegx.registry import Registry

registry: Registry = Registry("calibrator", "calsegx.calibrators")


def get(name: str) -> Any:
    """The calibrator called ``name``.

    Raises:
        UsageError: for an unknown name; the message lists the known ones.
    """
    return registry.get(name)


def names() -> list[str]:
    """The names of all calibrators, sorted."""
    return registry.names()
