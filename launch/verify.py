"""Read every byte of a dataset, before days are spent on it, and say what is wrong, odd or missing.

python -m launch.verify --data=DATASET --output=FOLDER

Errors are what training or prediction would refuse or what makes results wrong (unreadable files, other grids, unknown
label ids, one image under two subjects, a label given as an image); warnings are probably not what was meant; notes are
good to know.  ``FOLDER/verify.json`` holds all of them, and of every file its shape, spacing, orientation, labels with
their millilitres and the SHA-256 of its voxels.  The exit code is 3 with any error.  ``--on_error=skip`` lists the
cases with errors, ends with 0 where others are left, and writes those as ``FOLDER/cases.tsv``:
``--config.data.root=FOLDER`` is then the dataset without the others.
"""

import dataclasses
import json
from itertools import groupby
from pathlib import Path

from absl import flags

from calsegx import files
from calsegx.data import index, layouts, verify
from calsegx.interfaces import DataError, UsageError
from calsegx.training import progress
from launch import common

MOST_LINES = 20  # of one check's warnings or notes on the terminal, where the JSON holds the rest


def verify_dataset(
    root: Path, layout: str = "auto", output: Path | None = None, on_error: str = "stop", workers: int = 0
) -> verify.Report:
    """Verify the dataset in ``root``, print a table and write ``output/verify.json``.

    Args:
        root: never written to.
        layout: a registered one, or auto.
        output: None: nothing is written.
        on_error: ``stop`` or ``skip``; every case is read with both.
        workers: cases read at once; 0: two for each core, at most 16.

    Raises:
        UsageError: when ``output`` lies in the dataset, or holds a table that ``skip`` would replace.
        DataError: when the folder is no dataset; after everything was printed and written, for any error with
            ``stop``, and with ``skip`` when no case is left or an error concerns the whole dataset.
    """
    if output:
        files.check_outside(output, root, "--output")
        if on_error == "skip" and (output / "cases.tsv").exists():
            raise UsageError(f"--output={output} holds a cases.tsv already; name another folder or move it away.")
    dataset = layouts.detect(root, layout)
    with progress.Progress("Verifying", len(dataset.cases), "cases") as bar:
        report = verify.verify(dataset, workers, bar.update)
    if output:
        files.write_atomically(output / "verify.json", json.dumps(report.to_json(), indent=2) + "\n")
    for line in table(report, complete=output is None):
        print(line)
    failing = report.failing()
    if on_error == "skip" and failing:
        print(f"Left out: {', '.join(failing)}")
    skipped = on_error == "skip" and len(failing) < len(dataset.cases) and not report.dataset_fails()
    if skipped and failing and output:
        left = tuple(case for case in dataset.cases if case.case_id not in failing)
        index.write_cases(dataclasses.replace(dataset, cases=left), output)
    if report.count("error") and not skipped:
        where = f"; all findings are in {output / 'verify.json'}" if output else ""
        raise DataError(
            f"{root} is not valid: {report.count('error')} error(s), in {len(failing)} of {len(dataset.cases)} cases"
            f"{where}; correct them, or leave these cases out."
        )
    return report


def table(report: verify.Report, complete: bool) -> list[str]:
    """Lines: one per finding, grouped by level and check; long groups of no errors are cut unless ``complete``."""
    lines = []
    for (level, check), group in groupby(report.findings, key=lambda finding: (finding.level, finding.check)):
        found = list(group)
        shown = found if complete or level == "error" else found[:MOST_LINES]
        lines.append(f"{level}: {check} ({len(found)})")
        lines += [f"  {finding.case_id or 'dataset'}: {finding.message}" for finding in shown]
        if len(shown) < len(found):
            lines.append(f"  and {len(found) - len(shown)} more in verify.json")
    return lines


def define_flags() -> None:
    """``--data``, ``--layout``, ``--output``, ``--on_error``, ``--workers``."""
    common.define_folder("data", "The dataset's folder.")
    flags.DEFINE_string("layout", "auto", "How the folder is laid out; auto: what it looks like.")
    flags.DEFINE_string("output", "", "Folder for verify.json; without it only the table is printed.")
    flags.DEFINE_enum("on_error", "stop", ["stop", "skip"], "Invalid cases: exit code 3, or list and leave them out.")
    flags.DEFINE_alias("on-error", "on_error")
    flags.DEFINE_integer("workers", 0, "Cases read at once; 0: two for each core, at most 16.", lower_bound=0)


def main() -> None:
    """Verify, and say the verdict."""
    arguments = flags.FLAGS
    output = Path(arguments.output) if arguments.output else None
    report = verify_dataset(Path(arguments.data), arguments.layout, output, arguments.on_error, arguments.workers)
    left = len(report.dataset.cases) - len(report.failing())
    counts = ", ".join(f"{report.count(level)} {level}(s)" for level in verify.LEVELS)
    where = f"; all of it is in {output / 'verify.json'}" if output else ""
    print(f"{left} of {len(report.dataset.cases)} cases are valid ({counts}){where}")


if __name__ == "__main__":
    common.run(main, define_flags)
