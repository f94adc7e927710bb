"""The Segment Anything Model as pure functions of plain parameters."""

from calsegx.interfaces import Prompts
from calsegx.models.sam import backbone, whole
from calsegx.models.sam.frames import Geometry, postprocess, preprocess
from calsegx.models.sam.model import decode, encode, init
from calsegx.models.sam.presets import PRESETS, SamConfig
from calsegx.models.sam.weights import load, save
