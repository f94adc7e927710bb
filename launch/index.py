"""Say what is in a dataset folder, and write its index.

python -m launch.index --data=DATASET
python -m launch.index --data=DATASET --metadata=participants.tsv --output=FOLDER

Prints layout, cases, subjects, channels, shapes, spacing, labels with their volumes, centres, scanners and splits.
``--metadata`` is a tab- or comma-separated table with a column participant_id, subject_id or subject (with or without
``sub-``) and any of centre (center, site, institution_id), scanner (manufacturer) and field_strength.  ``--output``
writes FOLDER/cases.tsv and FOLDER/dataset.json, which can be edited and used as a dataset: --config.data.root=FOLDER.
The dataset itself is never written to.
"""

import sys
from pathlib import Path

from absl import flags

from calsegx.data import cases, index, layouts
from calsegx.training import progress
from launch import common


def index_dataset(
    root: Path,
    layout: str = "auto",
    metadata: Path | None = None,
    output: Path | None = None,
    headers_only: bool = False,
    workers: int = 4,
) -> list[str]:
    """Read the index and measure every case; returns the lines that say what there is, and writes to ``output``.

    Raises:
        InputError: for anything that cannot be used; nothing is written then.
    """
    name, _ = layouts.recognise(root, layout)
    dataset = cases.read(root, name)
    if metadata:
        dataset, notes = index.add_metadata(dataset, metadata)
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
    if output:
        index.check_folder(dataset, output)
    with progress.Progress("Reading", len(dataset.cases), "cases") as bar:
        measured = index.measure(dataset, workers, headers_only, bar.update)
    if output:
        index.write_cases(dataset, output)
    return index.describe(name, dataset, measured)


def define_flags() -> None:
    """The dataset, the side table and where the index goes."""
    flags.DEFINE_string("data", None, "The dataset's folder.", required=True)
    flags.DEFINE_string("layout", "auto", "Its layout, or auto.")
    flags.DEFINE_string("metadata", "", "A table with centre, scanner or field_strength by subject.")
    flags.DEFINE_string("output", "", "Folder for cases.tsv and dataset.json; empty: only print.")
    flags.DEFINE_bool("headers_only", False, "Read headers only: quick, but without the labels' volumes.")
    flags.DEFINE_integer("workers", 4, "Files read at a time.", lower_bound=1)


def main() -> None:
    """Print what there is, and where the index is."""
    f = flags.FLAGS
    metadata, output = (Path(value) if value else None for value in (f.metadata, f.output))
    for line in index_dataset(Path(f.data), f.layout, metadata, output, f.headers_only, f.workers):
        print(line)
    if output:
        print(f"The index is in {output / index.table.FILE_NAME}; use it with --config.data.root={output}")


if __name__ == "__main__":
    common.run(main, define_flags)
