"""Post-hoc calibrators: fitted on source validation voxels, applied to logits; one registered file each.

A calibrator has ``fit(chunks, *, options) -> params`` (plain JSON values) and ``apply(params, logits) ->
logits``.
"""

from calsegx.registry import Registry

registry: Registry = Registry("calibrator", "calsegx.calibrators")
