"""Training, validation, evaluation and prediction see the same slices, and give the same Dice."""

import dataclasses

import jax
import nibabel
import numpy as np
import pytest

from calsegx.data import frames, nifti, pipeline
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import predict as case_prediction
from calsegx.evaluation import study
from calsegx.training import caching, loop, model_folder
from launch import calibrate, components, evaluate, predict, train

SETTINGS = {
    "default": {},
    "together": {  # in the default suite; the others one by one say which of them fails
        **{"slice_axis": "coronal", "resample": "36x40x44", "adjacent_slices": True, "channels": "FLAIR"},
        "intensity": "z_score",
    },
    "coronal": {"slice_axis": "coronal"},
    "sagittal": {"slice_axis": "sagittal"},
    "plane": {"resample": "40x44"},
    "volume": {"resample": "36x40x44"},
    "adjacent": {"adjacent_slices": True, "channels": "FLAIR"},
    "z_score": {"intensity": "z_score"},
}
# The decoder sees the same slices in batches of other sizes, whose matrix products add up in another order; the encoder
# is called alike everywhere.  In logits that is below 1e-4 here; a Dice changes where a voxel lies that near one half.
LOGITS, PROBABILITIES, DICE = 1e-3, 1e-4, 1e-3


def each_setting(*quick):
    """All settings; those that are not ``quick`` are for the slow suite."""
    settings = [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in SETTINGS]
    return pytest.mark.parametrize("run", settings, indirect=True, scope="module")


@pytest.fixture(scope="module")
def run(request, config, tmp_path_factory):
    """A trained run, its folder and its summary."""
    folder = tmp_path_factory.mktemp(f"same_{request.param}")
    data = dataclasses.replace(config.data, cache="", **SETTINGS[request.param])
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2)
    config = dataclasses.replace(
        config, loss="dice", steps=60, validate_every=60, save_every=60, data=data, optimizer=optimizer
    )
    return folder / "run", train.train(config, folder / "run")


@pytest.fixture(scope="module")
def model(run):
    """The trained decoder, its components and the study that evaluates it from the run's cache."""
    params, record = model_folder.load(run[0])
    parts = components.of_model(record, "")
    cache = components.feature_cache(parts, run[0])
    work = study.Study(cache, parts.backbone, parts.class_map, parts.config.protocol, "scanner", parts.config.data)
    return parts, work, study.Model("sam_ft", 42, jax.device_put(params), record["decoder_sha256"])


def dice(one, other):
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def of_training(model, case):
    """Foreground probabilities from the loop's own validation batches, one row of which is one slice."""
    parts, work, trained = model
    subject = study.load(work, case)
    batches = pipeline.evaluation_batches(
        work.cache, [case.case_id], parts.config.batch_size, parts.config.protocol, loop.VALIDATION_BATCHES
    )
    low_res = {}
    for batch, count in batches:
        logits = np.asarray(work.decode(trained.params, work.frozen, batch.features.astype(np.float32), batch.prompts))
        for row in range(count):
            same = (subject.cached.features == batch.features[row]).all(axis=(1, 2, 3))
            assert same.sum() == 1
            low_res[int(np.flatnonzero(same)[0])] = logits[row]
    assert sorted(low_res) == list(range(len(subject.cached.slices)))
    logits = case_prediction.case_logits(np.stack([low_res[i] for i in sorted(low_res)]), subject.geometry)
    return study.foreground(subject, logits)


@each_setting("default", "together")
def test_the_same_dice_on_every_path(run, model, tmp_path):
    parts, work, trained = model
    predict.predict(run[0], tmp_path, split="val")
    for case in parts.select("val"):
        subject = study.load(work, case)
        evaluated = study.foreground(subject, study.slice_logits(work, work.decode, trained.params, subject))
        of_batches = of_training(model, case)
        np.testing.assert_allclose(of_batches, evaluated, atol=PROBABILITIES)

        written = nibabel.load(tmp_path / f"{case.case_id}_prob-whole_tumour.nii.gz")
        mask, label = (nibabel.load(path) for path in (tmp_path / f"{case.case_id}.nii.gz", case.label))
        for image in (written, mask):
            assert image.shape == label.shape
            np.testing.assert_array_equal(image.affine, label.affine)
        axis = parts.config.data.slice_axis
        predicted = nifti.read(tmp_path / f"{case.case_id}_prob-whole_tumour.nii.gz", slice_axis=axis).voxels
        np.testing.assert_allclose(predicted, evaluated[..., 0], atol=PROBABILITIES)

        by_file = dice(np.asarray(mask.dataobj) == 1, np.asarray(label.dataobj) > 0)
        by_cache, by_training = (
            dice(case_prediction.segment(volume) > 0, subject.truth > 0) for volume in (evaluated, of_batches)
        )
        assert 0.05 < by_file < 0.999  # there is something to agree on
        assert by_cache == pytest.approx(by_file, abs=DICE)
        assert by_training == pytest.approx(by_file, abs=DICE)


@each_setting("default", "together")
def test_the_loops_validation_loss_is_that_of_freshly_prepared_slices(run, model):
    parts, work, trained = model
    task = components.objective(parts.config, 1).task
    encode = caching.case_encoder(parts.backbone, 0, components.encoder_mesh(parts.config))
    losses = []
    for case in parts.select("val"):
        prepared = parts.prepare(case)
        asked = pipeline.protocol_prompts(prepared.prompts, parts.config.protocol)
        features = encode(prepared)
        cached = work.cache.read_case(case.case_id, "view0")
        np.testing.assert_array_equal(prepared.slices, cached.slices)
        np.testing.assert_allclose(features.astype(np.float32), np.asarray(cached.features, np.float32), atol=LOGITS)
        logits = case_prediction.predict_slices(work.decode, trained.params, work.frozen, features, asked, 16)
        labels = frames.labels_to_low_res(prepared.labels, prepared.geometry, 1)
        np.testing.assert_array_equal(labels, cached.labels)
        losses.append(np.asarray(task(logits, labels.astype(np.int32))))
    assert run[1]["validation_loss"] == pytest.approx(float(np.mean(np.concatenate(losses))), abs=LOGITS)


def dice_of(rows, method):
    chosen = (method, case_metrics.DSC, case_metrics.ALL)
    return {row.case_id: row.value for row in rows if (row.method, row.metric, row.class_name) == chosen}


@each_setting("together")
def test_evaluation_and_calibration_to_the_end(run, model, tmp_path):
    parts, _, _ = model
    calibrated = calibrate.calibrate(run[0], "image_temperature", "dilated")  # it sees the slices' images
    assert calibrated.params["voxels"] > 0
    calibrated.path.unlink()
    before = dice_of(calibrated.rows, calibrate.BEFORE)
    evaluated = dice_of(evaluate.evaluate([run[0]], tmp_path / "evaluation").rows, "sam_ft:dice")
    predict.predict(run[0], tmp_path / "predicted", split="test")
    assert set(evaluated) == {case.case_id for case in parts.select("test")}
    for case in parts.select("test"):
        mask, label = (nibabel.load(path) for path in (tmp_path / f"predicted/{case.case_id}.nii.gz", case.label))
        by_file = dice(np.asarray(mask.dataobj) == 1, np.asarray(label.dataobj) > 0)
        assert evaluated[case.case_id] == pytest.approx(by_file, abs=DICE)
        assert before[case.case_id] == pytest.approx(by_file, abs=DICE)

    # Another dataset is prepared by the model's own settings: the same files score the same there.
    other = tmp_path / "other"
    other.mkdir()
    first, channels = parts.select("test")[0], dict.fromkeys(parts.channels)
    columns = ["case_id", "subject_id", *(f"image:{channel}" for channel in channels), "label", "scanner"]
    cells = [first.case_id, "new", *(str(first.images[channel]) for channel in channels), str(first.label), "C"]
    (other / "cases.tsv").write_text("\t".join(columns) + "\n" + "\t".join(cells) + "\n")
    elsewhere = evaluate.evaluate([run[0]], tmp_path / "elsewhere", root=str(other))
    assert dice_of(elsewhere.rows, "sam_ft:dice") == {first.case_id: pytest.approx(evaluated[first.case_id])}
