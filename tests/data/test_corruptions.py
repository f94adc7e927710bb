"""Corruptions: what each does to an image, how it grows with the level, and that it is the same everywhere."""

import hashlib
import inspect

import numpy as np
import pytest
from scipy import ndimage

from calsegx.data import corruptions
from calsegx.interfaces import UsageError

SPACING = (3.0, 1.0, 1.0)
NAMES = corruptions.names()


def head(shape=(9, 40, 36), background=0.0):
    """An ellipsoid with a bright shell, a textured inside and a dark hole; background 0 or a constant."""
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    radius = np.sqrt(0.5 * d**2 + (h / 0.8) ** 2 + (w / 0.7) ** 2)
    hole = (h - 0.2) ** 2 + w**2 < 0.04
    image = np.where(radius < 1, 300 + 80 * np.sin(9 * w) * np.cos(7 * h), background)
    sharp = np.where(hole, 60, np.where((radius > 0.8) & (radius < 1), 500, image))
    return ndimage.gaussian_filter(sharp, (0, 0.8, 0.8)).astype(np.float32)


def distance(name, level, image, case="case1"):
    changed = corruptions.corrupt(name, image, SPACING, level, case)
    return np.sqrt(np.mean((changed - image) ** 2, dtype=float))


def made(name, image, level=3, seed=0, spacing=SPACING, **options):
    """The corruption itself, without seeds of a case and without rounding."""
    function = corruptions.registry.get(name)
    return function(image.astype(float), spacing, level, np.random.default_rng(seed), **options)


def test_all_of_them_are_there():
    assert set(NAMES) == {
        *("motion", "ghosting", "spikes", "gibbs"),
        *("bias_field", "gamma", "contrast_swap", "gaussian_noise", "rician_noise"),
        *("blur", "anisotropic"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_parameter_of_five_values_and_says_where_it_comes_from(name):
    found = corruptions.parameters(name)
    assert found and all(len(values) == 5 for values in found.values())
    for values in found.values():
        assert (np.diff(values) > 0).all() or (np.diff(values) < 0).all()
    assert "Source: " in inspect.getdoc(corruptions.registry.get(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_distance_to_the_original_grows_with_the_level(name):
    image = head()
    distances = [
        np.mean([distance(name, level, image, f"case{index}") for index in range(6)]) for level in corruptions.LEVELS
    ]
    assert distances[0] > 0 and (np.diff(distances) > 0).all(), distances
    assert distances[0] < 0.05 * corruptions.reference(image), "level 1 is hardly visible"
    assert distances[-1] > 0.04 * corruptions.reference(image), "level 5 is severe"


@pytest.mark.parametrize("name", NAMES)
def test_it_depends_on_its_arguments_alone(name):
    image = head()
    first = corruptions.corrupt(name, image, SPACING, 3, "case1", "T1")
    np.random.default_rng(0).random(100)
    kept = image.copy()
    np.testing.assert_array_equal(corruptions.corrupt(name, image, SPACING, 3, "case1", "T1"), first)
    np.testing.assert_array_equal(image, kept)
    assert first.dtype == np.float32 and first.shape == image.shape
    others = [corruptions.corrupt(name, image, SPACING, 3, *key) for key in (("case2", "T1"), ("case1", "T2"))]
    random = name not in ("gibbs", "contrast_swap", "blur")
    if name in ("gamma", "anisotropic", "ghosting"):  # two choices: some of several cases differ
        others = [corruptions.corrupt(name, image, SPACING, 3, f"case{index}") for index in range(8)]
        assert any((other != first).any() for other in others) and any((other == first).all() for other in others)
    else:
        assert all((other != first).any() == random for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_it_follows_the_scale_of_the_image(name):
    image = head().astype(float)
    changed = made(name, image)
    np.testing.assert_allclose(made(name, image * 40), changed * 40, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(made(name, image / 40), changed / 40, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [1, 5])
@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 6, 6), np.float32),
        np.full((4, 6, 6), 7, np.float32),
        np.full((1, 1, 1), 7, np.float32),
        head((1, 31, 17)),
        head((5, 3, 2)),
        np.pad(np.ones((1, 1, 1), np.float32), 2),
        head() - 350,
    ],
    ids=["zero", "constant", "one_voxel", "one_slice", "tiny", "one_bright", "negative"],
)
def test_any_image_gives_finite_numbers(name, level, image):
    with np.errstate(all="raise"):
        changed = corruptions.corrupt(name, image, SPACING, level, "case1")
    assert changed.shape == image.shape and np.isfinite(changed).all()
    if image.min() == image.max() == 0:
        np.testing.assert_array_equal(changed, 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_below_zero_is_shifted_there_and_back(name):
    image, offset = head(), np.float32(512)  # exact in float32
    moved = corruptions.corrupt(name, image - offset, SPACING, 3, "case1")
    step = (image.max() - image.min()) / corruptions.STEPS
    np.testing.assert_allclose(moved + offset, corruptions.corrupt(name, image, SPACING, 3, "case1"), atol=1.01 * step)


def test_integers_are_rounded_and_cut_off():
    image = head() * 0.36  # up to 252
    changed = corruptions.corrupt("rician_noise", image, SPACING, 5, "case1", dtype=np.uint8)
    assert changed.dtype == np.uint8 and changed.max() == 255
    exact = corruptions.corrupt("rician_noise", image, SPACING, 5, "case1")
    assert np.abs(np.minimum(exact, 255) - changed).max() <= 0.51
    levels = np.unique(exact / (image.max() / corruptions.STEPS))
    assert np.abs(levels - np.rint(levels)).max() < 0.02  # float32 multiples of the step


# Of a frozen volume; made once.  What changes them changes everybody's benchmark: raise corruptions.VERSION.
FROZEN = {
    "anisotropic": "c3bbdfbe7014d5b64a1640b0c574ea6623a340e7ef93403b0375347b6e03b7b7",
    "contrast_swap": "28b0a1156e96d19799d3a9061021ecab0629106ffaa5f23f8da43614028be879",
    "gaussian_noise": "96fdc7ffda205c9380d25ab0a9168f8aeb6748d68d12ca85527ea1e853c5ef6d",
    "ghosting": "119e261b19d3e2e06fbe4802fa5bb528b5847e7f2369ea22aa55b19934d941d1",
}


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_the_voxels_are_the_same_everywhere(name):
    image = (np.arange(6 * 20 * 18).reshape(6, 20, 18) * 7919 % 1009).astype(np.int16)
    image[:, :3] = 0
    changed = corruptions.corrupt(name, image.astype(np.float32), SPACING, 4, "sub-01", "T1", np.int16)
    assert hashlib.sha256(changed.astype("<i2").tobytes()).hexdigest() == FROZEN[name]


def test_the_seed_is_the_sha256_of_the_key():
    expected = np.random.PCG64(int(hashlib.sha256(b"case1\0T1\0motion\x003").hexdigest(), 16))
    found = corruptions.generator("case1", "T1", "motion", 3)
    assert found.integers(1 << 60) == np.random.Generator(expected).integers(1 << 60)


def test_unknown_names_and_levels_name_the_nearest():
    with pytest.raises(UsageError, match="no corruption named 'gosting'.*Did you mean 'ghosting'"):
        corruptions.corrupt("gosting", head(), SPACING, 1, "case1")
    for level, nearest in ((0, 1), (9, 5)):
        with pytest.raises(UsageError, match=f"level {level}; levels are 1 to 5, the nearest is {nearest}"):
            corruptions.corrupt("blur", head(), SPACING, level, "case1")


def test_rician_noise_of_an_empty_background_has_the_mean_of_rayleigh():
    image = np.zeros((20, 60, 60), np.float32)
    image[:, :2] = 100
    sigma = 100 * corruptions.parameters("rician_noise")["sigma"][2]
    noise = made("rician_noise", image)[:, 2:]
    assert noise.mean() == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=0.01)
    assert noise.std() == pytest.approx(sigma * np.sqrt(2 - np.pi / 2), rel=0.01)


def test_gaussian_noise_has_its_standard_deviation_and_never_falls_below_zero():
    image = np.full((10, 60, 60), 100, np.float32)
    assert made("gaussian_noise", image, 5).std() == pytest.approx(5, rel=0.02)
    assert made("gaussian_noise", head(), 5).min() == 0


def test_ghosts_stand_at_equal_distances_along_the_rows():
    image = np.zeros((1, 60, 16))
    image[0, 4:8, 4:12] = 100
    found = set()
    for seed in range(6):
        changed = made("ghosting", image, 5, seed)
        ghosts = changed[0, :, 8] - np.median(changed[0, :, 8])  # the kept centre line adds a constant
        found.add(tuple(np.flatnonzero(ghosts > 15)))
        assert changed[0, :, :4].max() < 1e-9  # along the rows only
    block = np.arange(4, 8)
    assert found == {(*block, *block + 30), (*block, *block + 20, *block + 40)}


def test_gibbs_leaves_nothing_outside_the_centre_of_k_space():
    image = head((2, 40, 36)) + 2000  # far above 0, so that the magnitude changes nothing
    spectrum = np.abs(np.fft.fft2(made("gibbs", image, 3)))
    share = corruptions.parameters("gibbs")["share"][2]
    inside = [np.abs(np.fft.fftfreq(size)) <= share / 2 for size in image.shape[1:]]
    kept = np.broadcast_to(inside[0][:, None] & inside[1], spectrum.shape)
    np.testing.assert_allclose(spectrum[kept], np.abs(np.fft.fft2(image.astype(float)))[kept], rtol=1e-9, atol=1e-6)
    assert spectrum[~kept].max() < 1e-6


def test_a_spike_is_one_point_of_k_space():
    image = np.full((4, 20, 18), 50, np.float32)
    squared = made("spikes", image, 4) ** 2  # |a + b e^(i k r)|^2 = a^2 + b^2 + 2 a b cos(k r)
    spectrum = np.abs(np.fft.fftn(squared)) / image.size
    intensity = corruptions.parameters("spikes")["intensity"][3]
    assert spectrum[0, 0, 0] == pytest.approx(50**2 * (1 + intensity**2))
    others = np.sort(spectrum.ravel())[::-1][1:]
    np.testing.assert_allclose(others[:2], 50**2 * intensity, rtol=1e-9)
    assert others[2] < 1e-6


def test_only_one_axis_loses_its_high_frequencies():
    image = np.random.default_rng(0).random((9, 40, 36)).astype(np.float32) + 1
    axes = set()
    for seed in range(8):
        changed = made("anisotropic", image, 4, seed)
        left = []
        for axis in range(3):
            energy = [np.abs(np.fft.fft(v - v.mean(), axis=axis)) ** 2 for v in (image, changed)]
            high = np.abs(np.fft.fftfreq(image.shape[axis])) > 0.3
            shares = [np.compress(high, e, axis=axis).sum() / e.sum() for e in energy]
            left.append(shares[1] / shares[0])
        axes.add(int(np.argmin(left)))
        assert min(left) < 0.1 and sorted(left)[1] > 0.8
    assert axes == {1, 2}  # never along the thick slices
    np.testing.assert_allclose(made("anisotropic", np.full((9, 40, 36), 5.0)), 5, rtol=1e-12)


def test_motion_keeps_the_centre_of_k_space_and_one_slice_its_plane():
    image = head().astype(float) + 1e7  # far above 0, so that the magnitude of what became complex is its real part
    for seed in range(5):
        changed = made("motion", image, 2, seed)
        np.testing.assert_allclose(changed.sum(1), image.sum(1), rtol=0, atol=0.1)
        assert np.abs(changed - image).max() > 5
    image = head()
    assert made("motion", image, 3, degrees=(0,) * 5, millimetres=(0,) * 5) == pytest.approx(image, abs=1e-9)
    assert np.abs(made("motion", image[4:5], 5) - image[4:5]).max() > 50


def test_shifts_keep_the_energy_of_k_space():
    """A shift changes phases only."""
    image = np.zeros((1, 64, 64))
    image[0, 24:40, 24:40] = 100
    changed = made("motion", image, 5, spacing=(1, 1, 1), degrees=(0,) * 5)
    energy = [np.sum(v**2) for v in (image, changed)]
    assert energy[1] == pytest.approx(energy[0], rel=0.1)  # less what linear interpolation takes
    assert np.abs(changed - image).max() > 20


def test_the_bias_field_is_smooth_has_its_spread_and_leaves_the_background():
    image = head()
    changed = made("bias_field", image, 4)
    inside = corruptions.head(image)
    log_field = np.log(changed[image > 0] / image[image > 0])
    spread = np.log(changed[inside] / image[inside]).std()
    assert spread == pytest.approx(corruptions.parameters("bias_field")["spread"][3], rel=1e-6)
    assert np.abs(log_field).max() < 5 * spread and (changed[image == 0] == 0).all()


def test_gamma_keeps_black_and_the_bright_end():
    image = head()
    bright = corruptions.reference(image)
    for seed in range(4):
        changed = made("gamma", image, 5, seed)
        assert (changed[image == 0] == 0).all()
        np.testing.assert_allclose(changed[image == bright], bright)


def test_contrast_swap_turns_the_order_round_within_the_head_alone():
    image = head(background=20.0)
    changed = made("contrast_swap", image, 5)
    inside = corruptions.head(image)
    assert inside[4, 24, 18] and image[4, 24, 18] < 61  # the hole belongs to the head
    np.testing.assert_array_equal(changed[~inside], image[~inside])
    assert np.corrcoef(changed[inside], image[inside])[0, 1] < -0.99


def test_blur_is_measured_in_millimetres():
    image = np.zeros((9, 41, 41))
    image[4, 20, 20] = 1
    changed = made("blur", image, 3)
    sigma = corruptions.parameters("blur")["millimetres"][2]
    positions = (np.arange(41) - 20.0) ** 2
    assert changed.sum() == pytest.approx(1)
    assert (changed.sum((0, 1)) * positions).sum() == pytest.approx(sigma**2, rel=0.02)
    assert (changed.sum((1, 2)) * (np.arange(9) - 4.0) ** 2).sum() == pytest.approx((sigma / 3) ** 2, rel=0.05)
