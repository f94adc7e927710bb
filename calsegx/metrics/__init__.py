"""Metrics on the native grid, in numpy and scipy: what a number means is part of its name.

``overlap`` (Dice), ``surface`` (HD95), ``calibration`` (streaming sums: ECE, MCE, Brier, NLL), ``regions``
(on which voxels calibration is measured) and ``statistics`` (intervals and paired tests over cases).
"""
