"""What the pages' commands name and a reader has: datasets, weights and trained runs, as small as they can be.

A name in ``STAND_INS`` that a snippet mentions, and that the page has not made by then, is put into its folder: by a
function of the path, or by a command of ours, run in a folder of the whole session.
"""

import contextlib
import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import yaml

from calsegx.data import layouts, phantoms
from calsegx.models.sam import backbone
from tests import random_sam, snippets
from tests.data.layouts import fake, trees
from tests.launch.conftest import SMALL
from tests.launch.test_layouts import fill
from tests.weights_conversion import checkpoints

# Appended to a command, so that a page may show real sizes.
QUICK = "--config.steps=2 --config.batch_size=2 --config.validate_every=2 --config.save_every=2 --config.data.views=1"
TINY = {
    "launch.train": QUICK,
    "launch.doctor": QUICK,
    "launch.cache_features": QUICK,
    "launch.make_phantoms": "--train=4 --val=2 --test=2 --processes=1",
}
SMALL_SAM = "small_sam"  # random weights; for commands that name none


def dataset(path, seed=2024):
    """Phantoms of two scanners and two centres, as an nnU-Net v2 folder with a table."""
    phantoms.write_dataset(path, train=6, val=2, test=4, scale=0.35, seed=seed, centres=2, processes=1)


def new_cases(path):
    """Two volumes without labels, as an nnU-Net v2 folder."""
    dataset(path.with_name("labelled"), seed=7)
    labelled = path.with_name("labelled")
    (path / "imagesTs").mkdir(parents=True)
    for image in sorted(labelled.glob("imagesTs/*"))[:8]:
        image.rename(path / "imagesTs" / image.name)
    shutil.copy(labelled / "dataset.json", path)
    rows = ["case_id\ti\tj\tk\tlabel"]
    for name in sorted({image.name[:-12] for image in (path / "imagesTs").iterdir()}):
        label = nibabel.load(labelled / "labelsTs" / f"{name}.nii.gz")
        voxels = np.argwhere(np.asarray(label.dataobj) > 0)
        rows.append("\t".join(map(str, (name, *voxels[len(voxels) // 2], 1))))
    path.with_name("clicks.tsv").write_text("\n".join(rows) + "\n")


def clicks(path):
    """A point in the tumour of each of the new cases."""
    if not path.exists():
        new_cases(path.with_name("NEW_CASES"))


def scans(path):
    """The new cases as a plain folder, numbered as the three channels of ``DATASET`` that a model takes by default."""
    clicks(path.with_name("clicks.tsv"))
    path.mkdir()
    for image in (path.with_name("NEW_CASES") / "imagesTs").glob("*_000[0-2].nii.gz"):
        shutil.copy(image, path)


def one_scan(name):
    """A function that copies a channel of the first of the new cases, or writes its clicks, as case ``p01``."""

    def write(path):
        cases = path.with_name("NEW_CASES") / "imagesTs"
        clicks(path.with_name("clicks.tsv"))
        case_id = sorted(cases.iterdir())[0].name[:-12]
        if name == "p01.tsv":
            head, *rows = path.with_name("clicks.tsv").read_text().splitlines()
            own = [row.replace(case_id, "p01") for row in rows if row.startswith(f"{case_id}\t")]
            path.write_text("\n".join([head, *own]) + "\n")
        else:
            shutil.copy(cases / name.replace("p01", case_id), path)

    return write


def masks(path):
    """Another tool's masks of the test cases: the truth."""
    root = path.parents[1] / "DATASET"
    if not root.exists():
        dataset(root)
    shutil.copytree(root / "labelsTs", path)


def participants(path):
    """Scanners by the subjects of the phantoms."""
    rows = [f"subject{number:03d}\t{('GE', 'Siemens')[number % 2]}" for number in range(1, 13)]
    path.write_text("\n".join(["participant_id\tscanner", *rows]) + "\n")


def small_sam(path):
    """SAM with random numbers; without two-way blocks in its decoder, which are most of what is compiled."""
    config = dataclasses.replace(SMALL, depth=1, global_attn_indexes=(0,), decoder_depth=0, decoder_heads=1)
    random_sam.save(path, config)


def brats(path):
    """BraTS 2021: four subjects."""
    for number in range(4):
        fake.brats_case(path / f"BraTS2021_{number:05d}")


def atlas(path):
    """ATLAS with three more subjects of the cohort that is trained on."""
    fake.atlas(path.parent, path.name)
    for number in (3, 4, 5):
        name = f"sub-r001s00{number}"
        start = f"Training/R001/{name}/ses-1/anat/{name}_ses-1_space-MNI152NLin2009aSym"
        fake.write(path, f"{start}_T1w.nii.gz", f"{start}_label-L_desc-T1lesion_mask.nii.gz")


def tree(make, **options):
    """A function that fills one of the fake trees."""

    def write(path):
        path.mkdir()
        make(path, **options)
        fill(layouts.detect(path))

    return write


def prostate(path):
    """Five cases of two sites."""
    for site, count in (("RUNMC", 4), ("BIDMC", 1)):
        for number in range(count):
            trees.touch(*(path / site / f"Case{number:02d}{end}.nii.gz" for end in ("", "_segmentation")))
    fill(layouts.detect(path))


def my_folders(path):
    """Folders CENTRE/PATIENT."""
    for name in ("graz/p1", "graz/p2", "graz/p3", "graz/p4", "lund/p1", "lund/p2"):
        fake.write(path, f"{name}/t1.nii.gz")
        fake.write(path, f"{name}/seg.nii.gz")
        (path / name / "seg.nii.gz").rename(path / name / "lesion.nii.gz")


def plan(path):
    """The shipped plan with two methods, one seed and the sizes of ``QUICK``."""
    content, weights = yaml.safe_load((snippets.ROOT / "configs" / path.name).read_text()), path.parents[1] / SMALL_SAM
    if not weights.exists():
        small_sam(weights)
    sizes = {"steps": 2, "batch_size": 2, "validate_every": 2, "save_every": 2}
    data = {**content["config"].get("data", {}), "views": 1}
    content["config"] = {**content["config"], **sizes, "data": data, "model": {"weights": str(weights)}}
    path.write_text(yaml.safe_dump({**content, "methods": content["methods"][:2], "seeds": [42]}))


ORIGIN = '--license=apache-2.0 --origin="drawings"'
TRAIN = "python -m launch.train --config.data.root=DATASET --config.data.source=A --config.method="
STAND_INS = {
    "DATASET": dataset,
    "NEW_CASES": new_cases,
    "clicks.tsv": clicks,
    "scans": scans,
    **{name: one_scan(name) for name in ("p01.tsv", *(f"p01_000{channel}.nii.gz" for channel in range(3)))},
    "predictions/nnunet": masks,
    "LABELLED_CASES": lambda path: dataset(path, seed=8),
    "participants.tsv": participants,
    SMALL_SAM: small_sam,
    "calsegx/weights/sam_tiny": lambda path: shutil.copytree(backbone.tiny_weights(), path),
    "weights/sam_vit_h": lambda path: shutil.copytree(backbone.tiny_weights(), path),
    "sam_vit_h_4b8939.pth": checkpoints.write_torch,
    "model.safetensors": checkpoints.write_safetensors,
    "BraTS2021": brats,
    "ATLAS_2": atlas,
    "Dataset001_Name": tree(trees.nnunet_v2, cases=("s1", "s2", "s3"), channels=("T1",)),
    "Task01_BrainTumour": tree(trees.decathlon, cases=("s1", "s2", "s3"), tests=()),
    "prostate": prostate,
    "fundus": lambda path: trees.pictures(path, ids=(0, 1, 2), count=5),
    "CT": tree(trees.nnunet_v2, cases=("s1", "s2", "s3"), channels=("CT",)),
    "MY_FOLDERS": my_folders,
    "configs/scanner_split.yaml": plan,
    "splits.json": "python -m launch.split --data=DATASET --protocol=random --output=splits.json",
    "runs/mine/sam_ft": TRAIN + "sam_ft --workdir=runs/mine/sam_ft",
    "runs/mine/calsam": TRAIN + "calsam --workdir=runs/mine/calsam",
    "runs/x/calsam_seed42": TRAIN + "calsam --workdir=runs/x/calsam_seed42",
    "runs/x/evaluation": "python -m launch.evaluate --runs=runs/x/calsam_seed42 --workdir=runs/x/evaluation",
    "calsam.zip": f"python -m launch.export --run=runs/x/calsam_seed42 --output=calsam.zip {ORIGIN}",
    "FOLDER_WITH_MANIFEST": "python -m launch.corrupt --data=DATASET --corruption=gaussian_noise --level=1 "
    "--output=FOLDER_WITH_MANIFEST",
}


def mentions(text, name):
    """Whether a snippet names a stand-in."""
    return re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-]|\.\w)", text)


class Workspace:
    """A folder in which snippets run; ``kit`` is the session's, where stand-ins are made once."""

    def __init__(self, folder, kit):
        self.folder, self.kit = Path(folder), Path(kit)

    def prepare(self, text):
        """Put what ``text`` mentions, and nothing has made yet, into the folder."""
        for name in STAND_INS:
            if mentions(text, name) and not (self.folder / name).exists():
                source = self.kit / name
                if not source.exists():
                    self._make(name)
                if self.folder != self.kit:
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if source.is_dir() else shutil.copy)(source, self.folder / name)

    def _make(self, name):
        make, path = STAND_INS[name], self.kit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(make):
            make(path)
        else:
            Workspace(self.kit, self.kit).run(make)

    def run(self, command):
        """Run a command as a reader would, with the sizes of ``TINY``; it must end well.

        A script of ours runs in this process, which has imported and compiled what it needs; all else in a shell.
        """
        module, given = snippets.script(command)
        if module:
            extra = TINY.get(module, "")
            if "--config." in extra and not re.search(r"--config\.model\.(weights|backbone)", command):
                extra += f" --config.model.weights={SMALL_SAM}"
            given = [*given, *shlex.split(extra)]
        written = () if "--check" in command else ("--output=", "--workdir=", "--root=")
        self.prepare(" ".join(text for text in given or [command] if not text.startswith(written or "\0")))
        with contextlib.chdir(self.folder):
            if module:
                snippets.call(module, given)
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
