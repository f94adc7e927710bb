"""calsegx: calibrated medical segmentation with SAM in JAX, under domain shift."""

__version__ = "0.1.0"
