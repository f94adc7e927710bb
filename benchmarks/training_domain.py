"""How often a case is said to be unlike the training cases: phantoms of the training's scanner A, and of scanner B.

python -m benchmarks.training_domain --seeds=1,2,3 --severities=0.7,0.35

Per seed the record is made of 16 training patients on A (``data.training_domain``, the tiny SAM); 12 other patients,
each scanned by A and by B, are then held against it.  A flagged case on A is a false alarm, one on B a detection.
``single`` is the same for slices, as if each were the only one with a prompt.
"""

import pathlib
import tempfile
from typing import Any

import numpy as np
from absl import flags

from benchmarks import measure
from calsegx import configs
from calsegx.data import phantoms, training_domain
from calsegx.training import caching
from launch import components

COLUMNS = {"seed": "d", "severity": "", "scanner": "", "cases": "d", "flagged": "d", "single": ".3f"}
COLUMNS |= {"least": ".2f", "median": ".2f", "most": ".2f", "limit": ".2f"}


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    flags.DEFINE_string("json", "", "File to write the rows to.", flag_values=values)
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Of the phantoms.", flag_values=values)
    flags.DEFINE_list("severities", ["0.7"], "How far scanner B is from A, 0 to 1.", flag_values=values)
    flags.DEFINE_integer("train", 16, "Training patients.", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("test", 12, "Test patients.", lower_bound=1, flag_values=values)


def rows_of(seed: int, severity: float, train: int, test: int, folder: pathlib.Path) -> list[measure.Row]:
    """A row per scanner."""
    phantoms.write_dataset(folder / "phantoms", train=train, test=test, seed=seed, severity=severity)
    data = configs.DataConfig(
        root=str(folder / "phantoms"), channels="T1c,T2,FLAIR", classes="whole_tumour=1+2+3", source="A"
    )
    parts = components.build(configs.TrainConfig(data=data))
    encode = caching.case_encoder(parts.backbone, 0, components.encoder_mesh(parts.config))

    def look(case: Any) -> training_domain.Look:
        prepared = parts.prepare(case)
        slices = training_domain.slice_vectors(encode(prepared), prepared.geometry)
        return training_domain.Look(prepared.intensities, slices)

    known = training_domain.describe(map(look, parts.select("train")))["features"]
    rows = []
    for scanner in phantoms.VENDORS:
        tested = [case for case in parts.select("test") if case.scanner == scanner]
        slices = [training_domain.distances(known, look(case).slices) for case in tested]
        distances = np.array([np.median(found) for found in slices])
        rows.append(
            {
                **{"seed": seed, "severity": severity, "scanner": scanner, "cases": len(tested)},
                "flagged": int(np.count_nonzero(distances > known["limit"])),
                "single": float(np.mean(np.concatenate(slices) > known["limit"])),
                **{"least": distances.min(), "median": float(np.median(distances)), "most": distances.max()},
                "limit": known["limit"],
            }
        )
    return rows


def run(options: flags.FlagValues) -> list[measure.Row]:
    """All seeds and severities."""
    rows: list[measure.Row] = []
    for seed in map(int, options.seeds):
        for severity in map(float, options.severities):
            with tempfile.TemporaryDirectory() as folder:
                rows += rows_of(seed, severity, options.train, options.test, pathlib.Path(folder))
    measure.print_table(rows, COLUMNS)
    if options.json:
        measure.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    measure.main(define_flags, run)
