"""Settings of preprocessing at the start of a run: what is noted, what is refused, what a model keeps."""

import dataclasses
import pathlib
import re

import nibabel
import numpy as np
import pytest

from calsegx import config_checks, configs
from calsegx.data import nifti
from calsegx.interfaces import Case, DataError, InputError, UsageError
from launch import common, components

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "data" / "preprocessing.md"


@pytest.fixture(scope="module")
def parts(config):
    return components.build(config)


def case_of(path, spacing, order=(0, 1, 2)):
    """A case whose one file has ``spacing`` along left-right, front-back and up, stored in ``order``."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[:, order]
    path.write_bytes(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), affine).to_bytes())
    return Case(path.stem, path.stem, {"T1c": path}, None, "train")


def with_settings(parts, **settings):
    data = dataclasses.replace(parts.config.data, **settings)
    return dataclasses.replace(parts, config=dataclasses.replace(parts.config, data=data))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_a_coarser_axis_is_noted_once_from_headers(parts, tmp_path, capsys, order):
    thick = [case_of(tmp_path / f"c{i}.nii", (1.0, 5.0, 0.9), order) for i in range(2)]
    cases = [case_of(tmp_path / "even.nii", (1.0, 1.0, 1.0), order), *thick]
    for case in cases:  # the header alone is read, and its voxels may be missing
        case.images["T1c"].write_bytes(case.images["T1c"].read_bytes()[:360])
    components.note_coarse_axis(parts, cases)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"^note: in 2 of 3 training cases .*2 times.*'c0': axial 0\.9 mm, coronal 5 mm, sagittal 1 mm.*"
        r"--config\.data\.slice_axis=coronal",
        line,
    )
    components.note_coarse_axis(with_settings(parts, slice_axis="coronal"), cases)
    assert capsys.readouterr().err == ""


def test_no_note_without_reason(parts, tmp_path, capsys):
    broken = case_of(tmp_path / "broken.nii", (1.0, 9.0, 1.0))
    broken.images["T1c"].write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken.nii is not a NIfTI file"):
        nifti.read_grid(broken.images["T1c"])
    nearly = case_of(tmp_path / "nearly.nii", (1.0, 1.9, 1.0))
    components.note_coarse_axis(parts, [broken, nearly, *parts.select("train")])
    assert capsys.readouterr().err == ""


def test_compressed_headers(tmp_path, dataset):
    path = sorted((dataset / "imagesTr").glob("*.nii.gz"))[0]
    shape, spacing_mm = nifti.read_grid(path)
    assert shape == nifti.read(path).voxels.shape
    for axis, distance in zip(configs.SLICE_AXES, spacing_mm, strict=True):
        assert distance == pytest.approx(nifti.read(path, slice_axis=axis).spacing_mm[0])
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"cut.nii.gz has no readable header"):
        nifti.read_grid(cut)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"adjacent_slices": True}, r"adjacent_slices takes the place of the channels T1c, T2, FLAIR"),
        ({"intensity": "percentiles"}, r"'percentiles'.*percentile"),
        ({"slice_axis": "axial "}, r"--config.data.slice_axis='axial '.*Did you mean 'axial'"),
        ({"resample": "128"}, r"--config.data.resample='128' must be"),
        ({"resample": "128x0"}, r"--config.data.resample='128x0' must be"),
        ({"window_width": 0.0}, r"--config.data.window_width=0.0 must be"),
    ],
)
def test_unusable_settings(config, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        components.build(dataclasses.replace(config, data=dataclasses.replace(config.data, **settings)))


def test_frame_settings_are_part_of_the_caches_signature(parts, tmp_path):
    components.feature_cache(with_settings(parts, cache=""), tmp_path)
    for name, value in {
        **{"intensity": "z_score", "lower_percentile": 1.0, "upper_percentile": 99.0, "window_centre": 1.0},
        **{"window_width": 2.0, "slice_axis": "coronal", "resample": "8x8", "adjacent_slices": True},
        **{"rotation_degrees": 1.0, "intensity_fraction": 0.1, "gamma": 1.0, "noise": 1.0, "low_resolution": 2.0},
    }.items():
        with pytest.raises(InputError, match=rf"made for another setting: \w+\.{name} is"):
            components.feature_cache(with_settings(parts, cache="", **{name: value}), tmp_path)


def test_the_page_names_existing_flags_with_usable_values(config):
    text = PAGE.read_text()
    known = common.field_names(configs.TrainConfig())
    found = re.findall(r"--(config(?:\.\w+)+)(?:=([\w.,-]+))?", text)
    assert len(found) > 20
    for name, value in found:
        assert name in known
        field = getattr(configs.DataConfig(), name.removeprefix("config.data."))
        if value and not isinstance(field, (str, bool)):
            settings = {name.removeprefix("config.data."): type(field)(value.rstrip(".,"))}
            config_checks.validate(dataclasses.replace(config, data=dataclasses.replace(config.data, **settings)))
    for name in ("percentile", "z_score", "medsam_mr", "medsam_ct"):
        assert f"| `{name}`" in text
