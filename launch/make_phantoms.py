"""Write a phantom MRI dataset: two scanners, four contrasts, tumours or strokes; no patient data.

    python -m launch.make_phantoms --root=data/Dataset001_Phantom

The default (16 training, 4 validation and 12 test patients, 44 scans) takes about 20 seconds on two cores and
100 MB.  The folder is an nnU-Net v2 raw dataset with a ``cases.tsv``.  Train on scanner A; the test patients
were seen by A and by B, so the difference between the two is the scanner's alone.
"""

import contextlib
from pathlib import Path
from typing import Any

from absl import flags

from calsegx.data import anatomy, phantoms
from calsegx.training import progress
from launch import common


def define_flags() -> None:
    """The dataset's place, size, lesion and shift."""
    common.define_folder("root", "The dataset folder to write; must be new or empty.")
    flags.DEFINE_integer("train", 16, "Training patients (scanner A).", lower_bound=1)
    flags.DEFINE_integer("val", 4, "Validation patients (scanner A).", lower_bound=0)
    flags.DEFINE_integer("test", 12, "Test patients (each scanned by A and by B).", lower_bound=0)
    flags.DEFINE_enum("kind", "tumour", anatomy.KINDS, "The lesion.")
    flags.DEFINE_float("severity", 0.7, "How far scanner B is from A, 0 to 1.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seed", 2024, "Seed of all patients and scans.", lower_bound=0)
    flags.DEFINE_integer("centres", 0, "Deal patients out to so many centres; 0: a scanner a centre.", lower_bound=0)
    flags.DEFINE_integer("processes", 2, "Worker processes; 1 works without any.", lower_bound=1)


def make_phantoms(root: Path, **options: Any) -> None:
    """``phantoms.write_dataset`` with progress."""
    with contextlib.ExitStack() as stack:
        bars: list[progress.Progress] = []

        def show(done: int, total: int) -> None:
            if not bars:  # nothing to show when the folder is refused
                bars.append(stack.enter_context(progress.Progress("Phantoms", total, "patients")))
            bars[0].update(done)

        phantoms.write_dataset(root, **options, progress=show)


def main() -> None:
    """Write the dataset, and say what is in it."""
    f = flags.FLAGS
    names = ("train", "val", "test", "kind", "severity", "seed", "centres", "processes")
    make_phantoms(Path(f.root), **{name: f[name].value for name in names})
    patients = f.train + f.val + f.test
    print(f"Wrote {patients + f.test} scans of {patients} patients ({f.kind}) to {f.root}.")


if __name__ == "__main__":
    common.run(main, define_flags)
