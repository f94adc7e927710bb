"""Which SAM a file holds: the configuration from names and shapes, and a strict plan of where each array goes."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calsegx.interfaces import DataError
from calsegx.models.sam import weights
from calsegx.models.sam.presets import SamConfig
from weights_conversion import meta_names, sources, transformers_names
from weights_conversion.sources import Source

DECODER_HEADS = 8  # in every SAM; no shape depends on it
BUFFERS = {name: "a buffer; the configuration holds these values" for name in ("pixel_mean", "pixel_std")}
VARIANTS = (  # what some names say about a file
    (r"^image_encoder\.trunk\.|^memory_|^sam_(mask|prompt)|^vision_encoder\.backbone\.", "a SAM 2 or SAM 3"),
    (r"^image_encoder\.(layers\.\d|patch_embed\.seq\.)", "a SAM with a TinyViT encoder (LiteMedSAM, MobileSAM)"),
    (r"^mask_decoder\.(hf_|compress_vit|embedding_encoder)", "a SAM-HQ"),
    (r"(?i)\.adapter|lora_", "a SAM with adapters in its encoder"),
    (r"\.kernel$", "a file that calsegx wrote, converted already"),
)


@dataclass(frozen=True)
class Plan:
    """Every array of a SAM and the name it has in the file."""

    source: Source
    naming: str  # in words
    config: SamConfig
    shapes: Mapping[str, tuple[int, ...]]  # our name -> our shape
    files: Mapping[str, str]  # Meta's name -> the file's
    ignored: Mapping[str, str]  # the file's name -> why it is not converted

    def read(self, name: str) -> np.ndarray:
        """An array by our name, float32 in our layout.

        Raises:
            DataError: when a value is not finite.
        """
        array = self.read_meta(meta_names.to_meta(name))
        return array.transpose(meta_names.axes(name, array.ndim))

    def read_meta(self, name: str) -> np.ndarray:
        """An array by Meta's name, float32 in Meta's layout."""
        array = self.source.read(self.files[name])
        if not np.isfinite(array).all():
            raise DataError(
                f"{self.source.path}: {self.files[name]} holds values that are not finite (NaN, or beyond float32); "
                "the file is damaged or its training diverged: get another one."
            )
        return array


def make_plan(source: Source) -> Plan:
    """Tell the configuration and assign every array, strictly both ways.

    Raises:
        DataError: when the file is another model, or names are missing or left over, or a shape or dtype is wrong.
    """
    naming, files, ignored, extra = _translate(source)
    _refuse_other_models(source, files)
    by_meta = {meta: source.shapes[name] for meta, name in files.items()}
    named = _from_names(by_meta)
    expected = {meta_names.to_meta(name) for name in weights.flatten(weights.template(named))}
    missing = sorted(expected - files.keys())
    extra += [files[meta] for meta in files.keys() - expected]
    if missing or extra:
        note = " (Meta's names)" if missing and naming != "Meta" else ""
        _refuse(source, f"missing {weights.some(missing)}{note}; not used {weights.some(sorted(extra))}")
    config = _from_shapes(source, named, by_meta)
    shapes = {name: leaf.shape for name, leaf in weights.flatten(weights.template(config)).items()}
    wrong = [
        f"{files[meta]} {by_meta[meta]} instead of {shape}"
        for meta, shape in sorted(map(_in_meta_layout, shapes.items()))
        if by_meta[meta] != shape
    ]
    wrong += [
        f"{name} {source.dtypes[name]} instead of a float of 16 to 64 bits"
        for name in files.values()
        if source.dtypes[name] not in sources.FLOATS
    ]
    if wrong:
        _refuse(source, f"wrong {weights.some(wrong)}")
    return Plan(source, naming, config, shapes, files, ignored)


def _refuse(source: Source, faults: str) -> None:
    raise DataError(f"{source.path} is no whole SAM: {faults}; get the file again, or another (docs/weights.md).")


def _in_meta_layout(item: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    name, shape = item
    inverse = np.argsort(meta_names.axes(name, len(shape)))
    return meta_names.to_meta(name), tuple(shape[axis] for axis in inverse)


def _translate(source: Source) -> tuple[str, dict[str, str], dict[str, str], list[str]]:
    """Naming, Meta's names of the file's, what is ignored and why, and names that are there twice."""
    prefix = "module." if all(name.startswith("module.") for name in source.shapes) else ""  # DistributedDataParallel
    short = {name.removeprefix(prefix): name for name in source.shapes}
    theirs = transformers_names.recognise(short)
    translated = transformers_names.to_meta(short) if theirs else {name: name for name in short}
    ignored = {**source.ignored, **{short[name]: reason for name, reason in BUFFERS.items() if name in short}}
    files: dict[str, str] = {}
    twice = []
    for name, meta in translated.items():
        if name in BUFFERS:
            continue
        if meta not in files:
            files[meta] = short[name]
        elif meta == transformers_names.MATRIX:
            ignored[short[name]] = _tied(source, files[meta], short[name])
        else:
            twice.append(short[name])
    return "transformers" if theirs else "Meta", files, ignored, twice


def _tied(source: Source, first: str, second: str) -> str:
    if not np.array_equal(source.read(first), source.read(second)):
        raise DataError(
            f"{source.path}: {first} and {second} are one matrix in a SAM but differ in this file; it was damaged or "
            "edited: get it again."
        )
    return f"the same matrix as {first}; compared, and equal"


def _refuse_other_models(source: Source, names: Mapping[str, str]) -> None:
    what = next((text for pattern, text in VARIANTS if any(re.search(pattern, name) for name in names)), None)
    if what is None and not any(name.startswith(("image_encoder.blocks.", "mask_decoder.")) for name in names):
        what = f"another model (its first entry is {next(iter(names), 'missing')})"
    if what is not None:
        raise DataError(
            f"{source.path} is {what}; what converts is Meta's SAM, MedSAM and transformers' SamModel, with a ViT "
            "encoder (docs/weights.md)."
        )
    if not any(name.endswith(".attn.rel_pos_h") for name in names):
        raise DataError(
            f"{source.path} has no relative positions (rel_pos_h), which tell the number of heads and the windows; a "
            "SAM without them cannot be converted."
        )


def _from_names(names: Mapping[str, object]) -> SamConfig:
    """What names alone tell; widths stay the defaults, and names do not depend on them."""

    def count(pattern: str) -> int:
        return len({match[1] for name in names if (match := re.match(pattern, name))})

    return SamConfig(
        depth=count(r"image_encoder\.blocks\.(\d+)\."),
        qkv_bias=any(name.endswith(".attn.qkv.bias") for name in names),
        num_multimask_outputs=count(r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.") - 1,
        decoder_depth=count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
        iou_head_depth=count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        decoder_heads=DECODER_HEADS,
    )


def _from_shapes(source: Source, named: SamConfig, shapes: Mapping[str, tuple[int, ...]]) -> SamConfig:
    """Widths, heads, windows and sizes; all names are known to be there."""

    def sizes(name: str, ndim: int) -> tuple[int, ...]:
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            _refuse(source, f"{name} has shape {shapes[name]} where {ndim} axes are expected")
        return shapes[name]

    embed_dim, _, patch, _ = sizes("image_encoder.patch_embed.proj.weight", 4)
    grid = sizes("image_encoder.pos_embed", 4)[1]
    tables = [sizes(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(named.depth)]
    spans = [(rows + 1) / 2 for rows, _ in tables]  # a table for n tokens along one side has 2 n - 1 rows
    head = tables[0][1]
    windows = collections.Counter(span for span in spans if span != grid)
    out_chans = sizes("image_encoder.neck.0.weight", 4)[0]
    if embed_dim % head:
        _refuse(source, f"its width {embed_dim} is no multiple of its head width {head} (rel_pos_h)")
    if len(windows) > 1 or not all(span.is_integer() for span in windows):
        found = ", ".join(f"{span:g}" for span in sorted(windows))
        _refuse(
            source, f"its relative positions are for windows of {found} tokens on a grid of {grid}, not of one size"
        )
    if out_chans % (2 * DECODER_HEADS):
        _refuse(source, f"its decoder is {out_chans} wide, no multiple of twice its {DECODER_HEADS} heads")
    hidden = sizes("image_encoder.blocks.0.mlp.lin1.weight", 2)[0]
    return dataclasses.replace(
        named,
        image_size=grid * patch,
        patch_size=patch,
        embed_dim=embed_dim,
        num_heads=embed_dim // head,
        # A window of the whole grid and global attention are the same function.
        global_attn_indexes=tuple(i for i, span in enumerate(spans) if span == grid),
        window_size=int(next(iter(windows), grid)),
        mlp_ratio=_ratio(hidden, embed_dim),
        out_chans=out_chans,
        mask_in_chans=sizes("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        decoder_mlp_dim=sizes("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        iou_head_hidden_dim=sizes("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


def _ratio(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` for which ``int(width * mlp_ratio)``, as the model computes it, is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
