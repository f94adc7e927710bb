"""How far a prediction can be trusted: densities to fit, statistics of repeated predictions, scores of a map.

``likelihood``: losses of networks that predict a distribution per voxel (jax); ``sampling``: variance, entropy and
mutual information of several predictions of one image (numpy); ``scores``: from an uncertainty map to one number per
image.
"""
