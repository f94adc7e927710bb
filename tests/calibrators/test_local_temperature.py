"""Local and image-based temperature scaling: T = 1 at the start, what can be learnt is learnt, 2D and 3D."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from calsegx import calibrators
from calsegx.calibrators import local_temperature, voxels
from calsegx.interfaces import DataError, UsageError

FAST = {"learning_rate": 0.03, "epochs": 10}


def simulate(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Logits that are too large by 1 where the image is 0 and by 4 where it is 1 (the right half)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(*shape, count)).astype(np.float32)
    classes = np.concatenate([np.zeros_like(logits), logits], -1) if count == 1 else logits
    labels = np.argmax(classes + rng.gumbel(size=classes.shape), axis=-1)
    image = np.zeros((*shape, 1), np.float32)
    image[..., shape[-1] // 2 :, :] = 1
    return logits * (1 + 3 * image), labels, image, np.ones(shape, bool)


def pooled_nll(logits: np.ndarray, labels: np.ndarray, region: np.ndarray) -> float:
    classes = voxels.as_classes(logits[region].astype(np.float64))
    log_p = scipy.special.log_softmax(classes, axis=1)
    return float(-np.mean(log_p[np.arange(len(log_p)), labels[region]]))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("leaves", [2, 4])
@pytest.mark.parametrize("whole_image", [False, True])
def test_the_start_is_the_identity(dimensions: int, leaves: int, whole_image: bool):
    logits, _, image, _ = simulate((2, 5, 6, 7)[: dimensions + 1])
    weights = local_temperature.initial(3, 1, dimensions, leaves=leaves, seed=4)
    options = {"whole_image": whole_image}
    np.testing.assert_allclose(local_temperature.temperatures(weights, logits, image, **options), 1, rtol=1e-6)
    weights = local_temperature.initial(3, 1, dimensions, leaves=leaves, original=True)
    original = local_temperature.temperatures(weights, logits, image, original=True, **options)
    np.testing.assert_allclose(original, 2, rtol=1e-7)


def test_a_convolution_by_hand():
    """One output, an interior voxel and a corner, whose neighbours are mirrored without repeating the border."""
    rng = np.random.default_rng(0)
    values, kernel = rng.normal(size=(1, 9, 10, 2)), rng.normal(size=(5, 5, 2, 1))
    found = local_temperature._convolve(jnp.asarray(values), jnp.asarray(kernel), jnp.asarray([0.5]))
    for row, column in ((4, 5), (0, 0), (8, 9)):
        rows, columns = (np.arange(-4, 5, 2) + start for start in (row, column))
        rows, columns = np.abs(rows), np.abs(columns)
        rows, columns = np.where(rows > 8, 16 - rows, rows), np.where(columns > 9, 18 - columns, columns)
        expected = 0.5 + np.sum(values[0][np.ix_(rows, columns)] * kernel[..., 0])
        np.testing.assert_allclose(found[0, row, column, 0], expected, rtol=1e-4)


def test_no_images_have_no_temperatures():
    weights = local_temperature.initial(1, 0, 2)
    assert local_temperature.temperatures(weights, jnp.zeros((0, 5, 6, 1))).shape == (0, 5, 6)


def test_memory_in_3d():
    """The 125 shifted copies of a volume are never there at once, in the gradient neither."""
    z = jax.ShapeDtypeStruct((1, 12, 16, 16, 1), jnp.float32)
    y, region = (jax.ShapeDtypeStruct(z.shape[:-1], dtype) for dtype in (jnp.int32, jnp.bool_))
    weights = local_temperature.initial(1, 0, 3)

    def loss(weights, z, y, region):
        return local_temperature.nll(weights, z, y, None, region)

    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(weights, z, y, region).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 60 * 4 * z.size


def test_the_original_form_has_a_dead_zone_and_ours_has_not():
    logits, labels, image, region = simulate((1, 6, 6))
    weights = local_temperature.initial(3, 1, 2)
    weights["bias"] = weights["bias"].at[:4].set(-9.0)
    weights["image_bias"] = weights["image_bias"] - 9
    grads = jax.grad(local_temperature.nll)(weights, logits, labels, image, region)
    assert float(np.abs(grads["bias"][0])) > 0
    assert float(local_temperature.temperatures(weights, logits, image).min()) >= 0.05
    dead = local_temperature.temperatures(weights, logits, image, original=True)
    np.testing.assert_allclose(dead, 1e-8, rtol=1e-6)


@pytest.mark.parametrize("original", [False, True])
def test_the_likelihood_is_finite_for_huge_logits_compiled_or_not(original: bool):
    logits, labels, image, region = simulate((1, 8, 8))
    weights = local_temperature.initial(3, 1, 2)
    weights["bias"] = weights["bias"] - 9.0  # temperatures at their lowest, for the original 1e-8
    weights["image_bias"] = weights["image_bias"] - 9

    def likelihood(weights):
        return local_temperature.nll(weights, 1e3 * logits, labels, image, region, original=original)

    eager, compiled = likelihood(weights), jax.jit(likelihood)(weights)
    np.testing.assert_allclose(compiled, eager, rtol=1e-5)
    assert np.isfinite(eager)
    for gradient in jax.tree.leaves(jax.jit(jax.grad(likelihood))(weights)):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("shape", "count"), [((3, 16, 16), 1), ((3, 16, 16), 3), ((2, 6, 8, 8), 3)])
def test_learns_where_the_logits_are_too_large(shape: tuple[int, ...], count: int):
    chunk = simulate(shape, count)
    logits, labels, image, region = chunk
    calibrator = calibrators.get("local_temperature")
    params = calibrator.fit([chunk], **FAST)
    assert params["nll_after"] < params["nll_before"] - 0.05
    np.testing.assert_allclose(params["nll_before"], pooled_nll(logits, labels, region), rtol=1e-5)
    mapped = calibrator.apply(params, logits, image)
    np.testing.assert_allclose(params["nll_after"], pooled_nll(mapped, labels, region), rtol=1e-4)
    scale = np.median((logits / mapped).reshape(-1, shape[-1], count), axis=(0, 2))
    assert scale[-4:].mean() > 1.5 * scale[:4].mean()
    assert json.loads(json.dumps(params)) == params


def test_image_temperature_is_one_number_per_image():
    first, second = simulate((3, 12, 12), seed=1), simulate((3, 12, 12), seed=2)
    flat = (first[0] / (1 + 3 * first[2]), first[1], 0 * first[2], first[3])  # calibrated, image 0
    steep = (4 * second[0] / (1 + 3 * second[2]), second[1], 0 * second[2] + 1, second[3])  # 4 too large, image 1
    calibrator = calibrators.get("image_temperature")
    params = calibrator.fit([flat, steep], learning_rate=0.05, epochs=10)
    assert params["calibrator"] == "image_temperature"
    scales = []
    for logits, _, image, _ in (flat, steep):
        scale = logits / calibrator.apply(params, logits, image)
        per_image = scale.reshape(3, -1)
        np.testing.assert_allclose(per_image, np.broadcast_to(per_image[:, :1], per_image.shape), rtol=1e-5)
        scales.append(per_image.mean())
    assert scales[1] > 2 * scales[0]
    assert params["nll_after"] < params["nll_before"] - 0.1


def test_deterministic_and_independent_of_chunks():
    logits, labels, image, region = simulate((6, 8, 8))
    options = {"learning_rate": 0.01, "epochs": 2, "max_voxels": 4 * 64}
    whole = local_temperature.fit([(logits, labels, image, region)], **options)
    parts = [tuple(a[i:j] for a in (logits, labels, image, region)) for i, j in ((0, 1), (1, 1), (1, 4), (4, 6))]
    assert local_temperature.fit(parts, **options) == whole
    assert (whole["images"], whole["images_seen"], whole["voxels"], whole["voxels_seen"]) == (4, 6, 4 * 64, 6 * 64)
    assert local_temperature.fit(parts, **options, seed=1)["weights"] != whole["weights"]


def test_images_of_two_sizes_and_only_the_region_counts():
    small, large = simulate((1, 6, 7)), simulate((2, 9, 8), seed=1)
    marked = []
    for logits, labels, image, region in (small, large):
        region = region.copy()
        region[:, :2] = False
        wrong = np.where(region, labels, -1)  # outside the region labels are not looked at
        marked.append((logits, wrong, image, region))
    marked.append(tuple(a if a.dtype != bool else np.zeros_like(a) for a in simulate((1, 6, 7))))
    params = local_temperature.fit(marked, **FAST)
    assert (params["voxels"], params["images"], params["images_seen"]) == (4 * 7 + 2 * 7 * 8, 3, 3)
    assert params["nll_after"] < params["nll_before"]


def test_without_image_light_weight_and_original():
    logits, labels, _, region = simulate((2, 8, 8))
    chunk = (2.5 * logits, labels, None, region)
    light = local_temperature.fit([chunk], use_image=False, leaves=2, **FAST)
    assert set(light["weights"]) == {"kernel", "bias"}
    assert np.shape(light["weights"]["kernel"]) == (5, 5, 3, 3)
    original = local_temperature.fit([chunk], use_image=False, original=True, **FAST)
    for params in (light, original):
        assert params["nll_after"] < params["nll_before"]
    kernel = np.array(original["weights"]["kernel"])
    np.testing.assert_array_equal(kernel[..., 0], kernel[..., 1])  # the original's leaves stay equal for ever
    ours = np.array(local_temperature.fit([chunk], use_image=False, **FAST)["weights"]["kernel"])
    assert np.abs(ours[..., 0] - ours[..., 1]).max() > 1e-3


def test_numpy_and_jax_agree():
    chunk = simulate((2, 6, 6))
    params = local_temperature.fit([chunk], learning_rate=0.01, epochs=2)
    on_host = local_temperature.apply(params, chunk[0], chunk[2])
    on_device = local_temperature.apply(params, jnp.asarray(chunk[0]), jnp.asarray(chunk[2]))
    assert isinstance(on_host, np.ndarray)
    assert isinstance(on_device, jax.Array)
    np.testing.assert_allclose(on_device, on_host, rtol=1e-6)
    np.testing.assert_array_equal(on_host.argmax(-1), chunk[0].argmax(-1))


@pytest.mark.parametrize("original", [False, True])
def test_separable_voxels_leave_the_logits(original: bool):
    logits, _, image, region = simulate((1, 1, 1))  # a single pixel, and right
    params = local_temperature.fit([(logits, logits.argmax(-1), image, region)], original=original)
    assert params["identifiable"] is False
    assert params["nll_before"] == params["nll_after"]
    np.testing.assert_array_equal(local_temperature.apply(params, logits, image), logits)


def test_bad_input():
    logits, labels, image, region = simulate((1, 6, 6))
    for chunk in ((logits, labels, None, region), (logits, labels, image, region.astype(int)), (logits[0],) * 4):
        with pytest.raises(DataError, match="needs logits .* or use_image=False"):
            local_temperature.fit([chunk])
    with pytest.raises(DataError, match="image that is not finite"):
        local_temperature.fit([(logits, labels, image * np.nan, region)])
    with pytest.raises(DataError, match="labels from 0 to 3"):
        local_temperature.fit([(logits, labels + (labels == labels.max()), image, region)])
    with pytest.raises(DataError, match="different numbers of axes, logits or channels"):
        local_temperature.fit([(logits, labels, image, region), simulate((1, 6, 6, 6))])
    for chunks in ([], [(logits, labels, image, ~region)]):
        with pytest.raises(DataError, match="got no voxels"):
            local_temperature.fit(chunks)
    for wrong in ({"leaves": 3}, {"epochs": 0}, {"learning_rate": 0.0}):
        with pytest.raises(UsageError, match="2 or 4 leaves, at least 1 epoch and a positive learning rate"):
            local_temperature.fit([(logits, labels, image, region)], **wrong)
    params = local_temperature.fit([(logits, labels, image, region)], epochs=1)
    with pytest.raises(DataError, match="needs the image with 1 channels"):
        local_temperature.apply(params, logits)
    with pytest.raises(DataError, match="2 spatial axes and 3 logits"):
        local_temperature.apply(params, logits[..., :2], image)


def test_registered_with_keyword_only_options():
    for name in calibrators.names():
        parameters = inspect.signature(calibrators.get(name).fit).parameters.values()
        spatial = calibrators.get(name).spatial
        assert spatial is (name in ("local_temperature", "image_temperature"))
        data = ["logits", "labels", "image", "region"] if spatial else ["logits", "labels"]
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == data
        assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)
