"""Convert SAM or MedSAM weights of PyTorch or transformers into a weights folder.

    python -m weights_conversion.convert_sam --source=sam_vit_h_4b8939.pth --output=weights/sam_vit_h

The source is Meta's or MedSAM's ``.pth`` (needs PyTorch) or transformers' ``model.safetensors`` (needs none); which
one it is, and the configuration, are told from its content.  The folder holds ``model.safetensors`` (float32),
``config.json``, ``README.md`` and ``SHA256SUMS``; it appears complete or not at all.  See docs/weights.md.
"""

import dataclasses
import math
from pathlib import Path

from absl import flags

import calsegx
from calsegx.interfaces import DataError
from calsegx.models.sam import presets, weights
from calsegx.models.sam.presets import SamConfig
from launch import common
from weights_conversion import check as checking
from weights_conversion import configuration, sources
from weights_conversion.configuration import Plan

PREPROCESSING = {  # --preprocessing -> fields of SamConfig; medsam's frames are in [0, 1]
    "sam": {},
    "medsam": {"preprocessing": "medsam", "pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (255.0, 255.0, 255.0)},
}
NAMES = {"vit_b": "SAM ViT-B", "vit_l": "SAM ViT-L", "vit_h": "SAM ViT-H"}

CARD = """---
license: apache-2.0
library_name: calsegx
tags: [segmentation, sam]
---
# {title}, converted for calsegx

{numbers:,} parameters, float32; frames of {config.image_size} x {config.image_size} pixels, preprocessing
`{config.preprocessing}`.

Origin: `{source.name}` ({container}, {naming} names), SHA-256 `{checksum}`, converted by
`python -m weights_conversion.convert_sam` of calsegx {version}; layouts and names changed, values did not.
Not converted: {ignored}.

Licence: the weights of SAM (Meta, https://github.com/facebookresearch/segment-anything) and of MedSAM
(https://github.com/bowang-lab/MedSAM) are Apache-2.0. If the origin is someone's fine-tuned model instead, their terms
hold, and this line and `license` above are for you to correct.

Please cite Kirillov et al., *Segment Anything*, ICCV 2023, and for MedSAM Ma et al., *Segment anything in medical
images*, Nature Communications 2024.

Not a medical device. For research only; not for diagnosis or treatment.
"""


def define_flags() -> None:
    """The source, the folder to write, the preprocessing and the comparison."""
    flags.DEFINE_string("source", None, "Meta's or MedSAM's .pth, or transformers' model.safetensors.", required=True)
    common.define_folder("output", "The weights folder to write; must not exist.")
    flags.declare_key_flag("output")  # else --help would leave it out
    flags.DEFINE_enum(
        "preprocessing",
        "auto",
        ["auto", *PREPROCESSING],
        "How images become frames; auto: medsam for a training checkpoint with a 'model' entry and for a file with "
        "'medsam' in its name, else sam.",
    )
    flags.DEFINE_bool("check", False, "Compare with transformers' SamModel before writing (needs torch, transformers).")


def convert(source: Path, output: Path, *, preprocessing: str = "auto", check: bool = False) -> Plan:
    """Convert a checkpoint; ``output`` appears complete or not at all.

    Args:
        source: a ``.pth`` or safetensors file.
        output: the weights folder to write.
        preprocessing: ``sam``, ``medsam`` or ``auto``, which is ``medsam`` for a training checkpoint and for a file
            with ``medsam`` in its name.
        check: compare with transformers first, and print the differences.

    Returns:
        What was converted, with the preprocessing in ``config``.

    Raises:
        UsageError: when ``output`` exists or cannot be made, ``source`` does not exist, or a library is missing.
        DataError: when the source cannot be used, or ``check`` finds a difference.
    """
    weights.refuse_existing(output)
    if check:
        checking.require_libraries()
    plan = configuration.make_plan(sources.open_source(source))
    if preprocessing == "auto":
        preprocessing, _ = _guess_preprocessing(plan.source)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, **PREPROCESSING[preprocessing]))

    def approve(folder: Path) -> None:
        rows = checking.check(folder, plan.read_meta)
        print("Beside transformers' SamModel in float64:", *rows, sep="\n")
        if not all(row.agrees for row in rows):
            differing = ", ".join(row.what for row in rows if not row.agrees)
            raise DataError(
                f"{source} gives other {differing} here than in transformers; nothing was written: please report it "
                "with the lines above."
            )

    weights.write(output, plan.config, plan.shapes, plan.read, _card(plan), approve=approve if check else None)
    return plan


def _guess_preprocessing(source: sources.Source) -> tuple[str, str]:
    """``auto``: the preprocessing, and why."""
    if source.is_training_checkpoint:
        return "medsam", "the file is a training checkpoint, as MedSAM's are; --preprocessing=sam changes it"
    if "medsam" in source.path.name.lower():
        return "medsam", "the file's name says MedSAM; --preprocessing=sam changes it"
    return "sam", "a plain state dict whose name does not say MedSAM; for MedSAM give --preprocessing=medsam"


def title(config: SamConfig) -> str:
    """What a configuration is called: its official name, or its size."""
    plain = dataclasses.replace(config, **{name: getattr(SamConfig, name) for name in PREPROCESSING["medsam"]})
    size = f"{config.embed_dim} wide, {config.depth} blocks"
    official = next((name for key, name in NAMES.items() if presets.PRESETS[key] == plain), f"SAM ({size})")
    return official.replace("SAM", "MedSAM") if config.preprocessing == "medsam" else official


def _card(plan: Plan) -> str:
    return CARD.format(
        title=title(plan.config),
        numbers=_count(plan),
        config=plan.config,
        source=plan.source.path,
        container=plan.source.container,
        naming=plan.naming,
        checksum=weights.sha256(plan.source.path),
        version=calsegx.__version__,
        ignored="; ".join(f"`{name}` ({reason})" for name, reason in plan.ignored.items()) or "nothing was left out",
    )


def _count(plan: Plan) -> int:
    return sum(math.prod(shape) for shape in plan.shapes.values())


def summary(plan: Plan, output: Path, preprocessing: str) -> str:
    """What was found and what was written, for a person."""
    c = plan.config
    reason = _guess_preprocessing(plan.source)[1] if preprocessing == "auto" else "as asked"
    lines = [
        f"{plan.source.path}: {title(c)}, {plan.source.container} with {plan.naming} names",
        f"  image {c.image_size}, patch {c.patch_size}, width {c.embed_dim}, {c.depth} blocks, {c.num_heads} heads, "
        f"window {c.window_size}, global blocks {', '.join(map(str, c.global_attn_indexes)) or 'none'}",
        f"  decoder width {c.out_chans}, {c.num_multimask_outputs + 1} masks, {c.decoder_heads} heads (no shape tells "
        "them; 8 in every SAM)",
        f"  preprocessing {c.preprocessing}: {reason}",
        *(f"  not converted: {name}, {reason}" for name, reason in plan.ignored.items()),
        f"Wrote {len(plan.shapes)} arrays, {_count(plan):,} numbers, to {output}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Convert, and say what was found."""
    f = flags.FLAGS
    plan = convert(Path(f.source), Path(f.output), preprocessing=f.preprocessing, check=f.check)
    print(summary(plan, Path(f.output), f.preprocessing))


if __name__ == "__main__":
    common.run(main, define_flags)
