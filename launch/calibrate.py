"""Fit a calibrator on a run's validation cases, save it with the model, and show what it changes there and elsewhere.

python -m launch.calibrate --run=runs/x/calsam_seed42 --calibrator="dirichlet(odir=0.01)" --region=all

``--calibrator`` is a registered name (temperature, vector, matrix, platt, dirichlet, local_temperature,
image_temperature) with its options in brackets, or ``package.module:object``.  It is fitted on the source domain's
validation cases alone: on the voxels of ``--region`` in their prompted slices, on the native grid.  The table shows
them and the test cases (with ``--data`` all labelled cases of another dataset) before and after.  ``launch.predict``
uses the saved ``model/calibrator.json`` from then on.  A calibrator that costs the validation cases more than one point
of DSC is saved with a warning.
"""

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from calsegx import calibrators, configs
from calsegx.calibrators import storage
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import predict as case_prediction
from calsegx.evaluation import study
from calsegx.evaluation.record import DSC
from calsegx.interfaces import Case, DataError, UsageError
from calsegx.losses import expression
from calsegx.metrics import overlap, regions
from calsegx.training import model_folder, progress
from launch import common, components, trained_runs

BEFORE, AFTER = "before", "after"
SHOWN = (case_metrics.ECE, case_metrics.BRIER, case_metrics.NLL)
VALIDATION, TEST = "validation", "test"
MOST_DSC_LOST = 0.01  # by the validation cases; more is said


class Calibrated(NamedTuple):
    """A fit, where it was saved, and what it changes."""

    name: str
    params: Mapping[str, Any]
    path: Path
    rows: Sequence[case_metrics.Row]  # methods ``before`` and ``after``; the domain says the split too
    relabelled: Mapping[str, int]  # by domain: cases with another segmentation than before


def calibrate(run: Path, calibrator: str = "temperature", region: str = "all", root: str = "") -> Calibrated:
    """Fit, save and compare.

    Args:
        run: the run folder, or its ``model`` folder.
        calibrator: a name, with options in brackets.
        region: of ``metrics.regions``, in the prompted slices.
        root: another dataset, on whose labelled cases the calibrator is shown; empty: on the run's test cases.

    Raises:
        InputError: for a calibrator or region that cannot be used, validation cases that are no longer those of the
            training, or subjects that are in the test split too.
    """
    name, options = read_calibrator(calibrator)
    regions.describe(region)  # refuses an unknown name
    params, record = model_folder.load(run)
    home = components.of_model(record, "")
    away = components.of_model(record, root) if root else home
    val = home.select("val")
    trained_runs.check_validation(record, val)
    tested = [case for case in home.dataset.cases if case.split == "test"]
    storage.check_split("val", [c.subject_id for c in val], [c.subject_id for c in tested])
    shown = [case for case in (away.dataset.cases if root else tested) if case.label is not None]
    trained_runs.check_unseen(record, shown, same_dataset=not root)

    work = _study(home, run)
    components.encode(home, work.cache, [(case, 1) for case in val])
    elsewhere = _study(away, run / "calibration" / Path(root).name) if root else work
    components.encode(away, elsewhere.cache, [(case, 1) for case in shown])

    config = home.config
    model = study.Model(configs.method_name(config), config.seed, jax.device_put(params), record["decoder_sha256"])
    fitted = study.fit_calibrator(
        work, model, val, name, options, region, lambda case: study.calibrator_image(home.prepare(case))
    )
    path = path_of(run)
    rows, relabelled, done = [], {}, 0
    names = tuple(dict.fromkeys((*case_metrics.REGIONS, region)))
    with progress.Progress("Comparing", len(val) + len(shown), "cases") as bar:
        for split, parts, at, members in ((VALIDATION, home, work, val), (TEST, away, elsewhere, shown)):
            for case in members:
                where = f"{split}, {at.domain_column} {at.domain(case)}"
                found, changed = _compare(parts, at, model, case, (name, fitted), where, names)
                rows += found
                relabelled[where] = relabelled.get(where, 0) + changed
                bar.update(done := done + 1, case.case_id)
    fitted["provenance"]["validation_dsc"] = {method: _validation_dsc(rows, method) for method in (BEFORE, AFTER)}
    storage.save(path, name, fitted)
    return Calibrated(name, fitted, path, rows, relabelled)


def _validation_dsc(rows: Sequence[case_metrics.Row], method: str) -> float | None:
    """Mean over the validation cases and 0 to 1; None where no case has a value."""
    values = tuple(
        row.value
        for row in rows
        if row.domain.startswith(VALIDATION)
        and (row.method, row.metric, row.class_name) == (method, case_metrics.DSC, case_metrics.ALL)
    )
    mean = overlap.CaseScores(values).finalise().mean
    return None if math.isnan(mean) else mean


def segmentation_warning(name: str, params: Mapping[str, Any]) -> str | None:
    """One sentence where a saved calibrator cost the validation cases more than ``MOST_DSC_LOST``; else None."""
    dsc = params["provenance"].get("validation_dsc", {})  # not in files of earlier versions
    before, after = dsc.get(BEFORE), dsc.get(AFTER)
    if before is None or after is None or before - after <= MOST_DSC_LOST:
        return None
    return (
        f"the calibrator {name} changes labels: mean DSC of the validation cases {100 * before:.1f} -> "
        f"{100 * after:.1f} points; fit --calibrator=temperature, which changes none, or another --region, or leave it "
        "out of predictions with --nocalibrate"
    )


def read_calibrator(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a calibrator, checked.

    Raises:
        UsageError: for an unknown name or option, or a value that it does not take.
    """
    name, options = expression.parse_call(text, "calibrator")
    fit = calibrators.get(name).fit
    parameters = inspect.signature(fit).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "provenance"]
    for option in options:
        if option not in known:
            raise UsageError(f"The calibrator {name!r} has no option {option!r}; it has: {', '.join(known)}.")
    try:
        fit((), **options)  # values are checked first; then there are no voxels
    except TypeError as error:
        raise UsageError(f"The calibrator {text!r} has an option of another type than it takes ({error}).") from error
    except DataError:
        return name, options
    raise UsageError(f"The calibrator {name!r} was fitted on no voxels; its fit must read the chunks.")


def path_of(run: Path) -> Path:
    """Where the calibrator of a run, or of a ``model`` folder, is saved."""
    return (run if (run / "model.json").exists() else run / "model") / "calibrator.json"


def of_run(run: Path, record: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The name and params of a run's saved calibrator; None where there is none.

    Raises:
        InputError: when it is damaged, or was fitted on other weights than the model's.
    """
    path = path_of(run)
    if not path.exists():
        return None
    name, params = storage.load(path)
    if params.get("provenance", {}).get("decoder_sha256") != record["decoder_sha256"]:
        raise DataError(
            f"{path} was fitted on another decoder than the one beside it; fit it again with launch.calibrate, or "
            "leave it out with --nocalibrate."
        )
    return name, params


def _study(parts: components.Components, folder: Path) -> study.Study:
    data = parts.config.data
    cache = components.feature_cache(parts, folder)
    return study.Study(cache, parts.backbone, parts.class_map, parts.config.protocol, data.domain, data)


def _compare(
    parts: components.Components,
    at: study.Study,
    model: study.Model,
    case: Case,
    calibrator: tuple[str, Mapping[str, Any]],
    where: str,
    region_names: Sequence[str],
) -> tuple[list[case_metrics.Row], bool]:
    """The rows of one case before and after, and whether its segmentation is another one."""
    subject = study.load(at, case)
    logits = study.slice_logits(at, at.decode, model.params, subject)
    component = calibrators.get(calibrator[0])
    image = study.calibrator_image(parts.prepare(case)) if component.spatial else None
    rows, masks = [], []
    for method, values in ((BEFORE, logits), (AFTER, component.apply(calibrator[1], logits, image))):
        volume = study.foreground(subject, values)
        key = case_metrics.CaseKey(method, model.seed, case.case_id, case.subject_id, where, case.split)
        found, _ = case_metrics.evaluate_case(
            volume, subject.truth, subject.spacing_mm, parts.class_map.names, key, region_names
        )
        rows += found
        masks.append(case_prediction.segment(volume))
    return rows, bool((masks[0] != masks[1]).any())


def table(done: Calibrated) -> str:
    """Before and after: means over cases, by domain and region, with the counts of undefined cases."""
    found = {
        (s.domain, s.metric, s.region, s.method): s
        for s in case_metrics.summarise(done.rows)
        if s.class_name == case_metrics.ALL
    }
    names = list(dict.fromkeys(row.region for row in done.rows if row.region != case_metrics.VOLUME))
    lines = []
    for domain, relabelled in done.relabelled.items():
        dice = [found[domain, *DSC, method] for method in (BEFORE, AFTER)]
        labels = f"labels changed in {relabelled}" if relabelled else "labels unchanged"
        text = f"DSC {_change(dice, 100, 1)} points ({_undefined(dice)}), {labels}"
        lines.append(f"{domain} ({_cases(dice[0].cases)}): {text}")
        for name in names:
            pairs = [[found[domain, metric, name, method] for method in (BEFORE, AFTER)] for metric in SHOWN]
            cells = [f"{metric} {_change(pair, 1, 4)}" for metric, pair in zip(SHOWN, pairs, strict=True)]
            marked = name if regions.label_independent(name) else name + "*"
            lines.append("  ".join([f"  {marked:9}", *(f"{cell:25}" for cell in cells), _undefined(pairs[0])]))
    return "\n".join([*lines, "* selected by the label: compare before and after there, do not read a value alone"])


def _change(pair: Sequence[case_metrics.Summary], scale: float, digits: int) -> str:
    return " -> ".join("undefined" if math.isnan(s.mean) else f"{scale * s.mean:.{digits}f}" for s in pair)


def _cases(count: int) -> str:
    return f"{count} case" if count == 1 else f"{count} cases"


def _undefined(pair: Sequence[case_metrics.Summary]) -> str:
    counts = dict.fromkeys(f"{s.undefined}/{s.values}" for s in pair)
    return f"undefined {' -> '.join(counts)}"


def summary(done: Calibrated) -> str:
    """What was fitted on what, and whether the voxels say what the calibrator should be."""
    params = done.params
    origin = params["provenance"]
    lead = (
        f"{done.name}: fitted on {params['voxels']} of {params['voxels_seen']} voxels, region {origin['region']} of "
        f"{_cases(len(origin['cases']))} of the validation split"
    )
    if not params["identifiable"]:
        return f"{lead}; not identifiable, so the logits stay as they are: {params['reason']}"
    return f"{lead}; NLL of these voxels {params['nll_before']:.4f} -> {params['nll_after']:.4f}"


def define_flags() -> None:
    """``--run``, ``--calibrator``, ``--region``, ``--data``."""
    flags.DEFINE_string("run", None, "Folder of a trained run.", required=True)
    flags.DEFINE_string("calibrator", "temperature", 'A calibrator with its options, e.g. "dirichlet(odir=0.01)".')
    flags.DEFINE_string("region", "all", "Voxels to fit on: all, p>0.01, pred_fg, dilated, union or gt_fg.")
    flags.DEFINE_string("data", "", "Another dataset folder, to show the calibrator on; default: the test cases.")


def main() -> None:
    """Calibrate, show before and after, and say where the calibrator is."""
    arguments = flags.FLAGS
    done = calibrate(Path(arguments.run), arguments.calibrator, arguments.region, arguments.data)
    print(summary(done))
    print(table(done))
    if (warning := segmentation_warning(done.name, done.params)) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"The calibrator is {done.path}")


if __name__ == "__main__":
    common.run(main, define_flags)
