"""Networks.  The only folder that imports flax; everything else sees ``Params`` and functions.

A backbone is a function ``(weights: Path | None, num_classes: int) -> interfaces.Backbone`` registered under a name
in one file of this folder.
"""

from calsegx.registry import Registry

registry = Registry("backbone", "calsegx.models")
