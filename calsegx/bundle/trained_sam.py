"""A bundle as parameters of ``calsegx.models.sam``, for Python in place of ``launch.predict``."""

from pathlib import Path

from calsegx import configs
from calsegx.bundle import archive
from calsegx.interfaces import DataError, Params
from calsegx.models import sam
from calsegx.models.sam import backbone, weights
from calsegx.training import model_folder


def load_sam(path: Path | str) -> tuple[sam.SamConfig, Params]:
    """The trained SAM of a bundle, a folder or a zip, for ``sam.encode`` and ``sam.decode``.

    Returns:
        The configuration, and ``{"image_encoder", "prompt_encoder", "class_decoder"}``: numpy arrays; the encoder is
        the trained one where the run trained it (``sam_whole``).  ``sam.decode`` then gives ``[B, K, 4h, 4w]``, one
        logit per class in the order of ``labels.json``, not calibrated.  Probabilities are the sigmoid of one class, or
        the softmax over a 0 for the background and several.  The predicted IoU was not trained: leave it.

    Raises:
        InputError: as ``open_bundle``, and for a bundle of another backbone or with other weights than the run's.
    """
    trained, record = model_folder.load(archive.open_bundle(Path(path)))
    model = record["config"]["model"]
    if model["backbone"] not in ("sam", *configs.WHOLE):
        raise DataError(f"The bundle {path} is of the backbone {model['backbone']!r}; only a SAM can be loaded so.")
    folder = Path(model["weights"]) if model["weights"] else backbone.tiny_weights()
    if not record["backbone"].startswith(weights.fingerprint(folder)):
        raise DataError(
            f"The bundle {path} was trained from weights with the fingerprint {record['backbone'][:12]}, but {folder} "
            f"has {weights.fingerprint(folder)[:12]}; restore those weights."
        )
    config, params = sam.load(folder)
    encoder: Params = params
    if model["backbone"] in configs.WHOLE:
        encoder, trained = trained["encoder"], trained["decoder"]
    return config, {
        "image_encoder": encoder["image_encoder"],
        "prompt_encoder": params["prompt_encoder"],
        "class_decoder": trained,
    }
