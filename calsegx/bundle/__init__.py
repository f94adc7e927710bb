"""Model bundles: everything that prediction with a trained run needs, in one folder or zip, checked before it is used.

A bundle is a ``model`` folder (``training.model_folder``) with the frozen encoder beside it, so it is loaded as a run
is.  The other files say in plain JSON what ``model.json`` makes the program do; they are held against it.

    decoder.safetensors, model.json      as in a run, without paths and without names of cases and subjects
    calibrator.json                      where one was fitted
    encoder/                             the frozen backbone's weights folder
    preprocessing.json, labels.json, prompt_protocol.json
    bundle.json                          format, licence, origin, training domains, results
    README.md, LICENSE                   the model card
    SHA256SUMS                           of every other file; ``sha256sum --check SHA256SUMS`` reads it
"""

from calsegx.bundle.archive import check_output, is_bundle, open_bundle, resolve, write
from calsegx.bundle.check import verify
from calsegx.bundle.contents import (
    CALIBRATOR,
    ENCODER,
    FORMAT,
    INCLUDED,
    MANIFEST,
    REFERENCE,
    SUMS,
    describe,
    public_calibrator,
    public_record,
    to_json,
)
from calsegx.bundle.trained_sam import load_sam
