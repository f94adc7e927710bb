"""How fast data comes: from files, from the feature cache, into a training step; and how fast a dataset is verified.

python -m benchmarks.data_pipeline --json=docs/data_pipeline.json --page=docs/data_pipeline.md

1. ``reading``: volumes and slices per second from .nii.gz, from .nii and from the cache.
2. ``cache``: the cache against raw .npy of the same arrays: single slices in a random order, and whole views.
3. ``waiting``: what data costs a training step of the demo's size.
4. ``verification``: every check of ``launch.verify`` on volumes of 240 x 240 x 155.

Files lie in the system's memory when they are read (they were just written), sides take turns in one process.  Unlike
the benchmarks for accelerators this one imports grain and nibabel: they are what it is about.
"""

import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import nibabel
import numpy as np
from absl import flags

from benchmarks import measure
from calsegx import configs, features, files, losses, models, sharding
from calsegx.data import classes, frames, nifti, pipeline, preprocessing, verify
from calsegx.interfaces import Case, Dataset, Prompts, UsageError
from calsegx.losses import expression
from calsegx.training import state as train_state
from calsegx.training import step as train_step

TABLES = ("reading", "cache", "waiting", "verification")
COLUMNS = {
    "reading": {"what": "", "volumes_per_second": ".2f", "slices_per_second": ".0f", "seconds": ".4f"},
    "cache": {
        **{"what": "", "slices": "d", "seconds": ".5f", "npy_seconds": ".5f", "gb_per_second": ".2f"},
        **{"ratio": ".2f", "target": ".2f"},
    },
    "waiting": {
        **{"what": "", "seconds": ".4f", "seconds_without_data": ".4f", "waiting": ".1%", "data": ".1%"},
        "target": ".0%",
    },
    "verification": {"what": "", "seconds": ".1f", "volumes_per_second": ".2f", "megabytes": ".0f", "workers": ""},
}
RATIO_TARGET = 0.8  # of the speed of raw .npy
WAITING_TARGET = 0.05  # of a training step
MARKS = ("<!-- tables of benchmarks.data_pipeline: begin -->", "<!-- tables of benchmarks.data_pipeline: end -->")
CHANNELS = ("T1c", "T2", "FLAIR")
TINY = (16, 16, 64)  # the features of the tiny SAM, with which the demo trains
VIEW = "view0"


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    listed = functools.partial(flags.DEFINE_list, flag_values=values)
    listed("tables", list(TABLES), "Which tables to make.")
    listed("volume", ["240", "240", "155"], "Voxels along each axis of a volume.")
    listed("features", ["64", "64", "256"], "Rows, columns and channels of a large encoder's features.")
    number = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    number("slices", 48, "Slices of a cached view.")
    number("rounds", 9, "Timed calls of each side.")
    number("steps", 10, "Training steps in a timed call.")
    number("volumes", 100, "Volumes to verify, four to a case.")
    define = functools.partial(flags.DEFINE_string, flag_values=values)
    define("json", "", "File to write the rows to.")
    define("page", "", "Page whose tables, between two marker comments, are to be replaced.")


def run(options: flags.FlagValues) -> list[measure.Row]:
    """Measure, print, write.

    Raises:
        UsageError: for a flag with an unusable value.
        InputError: when the page has no marker comments.
    """
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        raise UsageError(f"--tables has {unknown[0]!r}, which is none of {', '.join(TABLES)}.")
    if options.page:
        files.split_page(pathlib.Path(options.page), MARKS)
    measure.warn_if_busy()
    rows, texts = [], []
    makers = {"reading": reading, "cache": against_npy, "waiting": waiting, "verification": verification}
    for name in options.tables:
        with tempfile.TemporaryDirectory() as folder:
            found = [{"table": name, **row, **measure.machine()} for row in makers[name](pathlib.Path(folder), options)]
        rows += found
        title = "{table}: {device}, load average {load:.1f} before the run".format(**found[0])
        texts.append("\n".join([title, "", *measure.table(found, COLUMNS[name])]))
        print(f"\n{texts[-1]}\n", flush=True)
    measure.publish(options, MARKS, texts, rows)
    return rows


def reading(folder: pathlib.Path, options: flags.FlagValues) -> list[measure.Row]:
    """From files: single volumes, and a case of four of them prepared for the encoder.  From the cache: views."""
    shape = _volume(options)
    calls: dict[str, Callable[[], Any]] = {}
    counts: dict[str, tuple[int, int]] = {}  # volumes and slices of a call
    for ending in (".nii.gz", ".nii"):
        case = write_case(folder, "case", shape, 0, ending)
        path = case.images[CHANNELS[0]]
        calls[f"a volume from {ending}"] = functools.partial(nifti.read, path)
        counts[f"a volume from {ending}"] = 1, shape[2]
        name = f"a case from {ending}, prepared and framed (256 pixels)"
        calls[name] = functools.partial(prepare, case)
        counts[name] = 4, len(prepare(case))
    for what, size in _features(options).items():
        cache = write_cache(folder / what, options.slices, size, ["case"])[0]
        calls[f"a view from the cache, {what}"] = functools.partial(cache.read_case, "case", VIEW)
        counts[f"a view from the cache, {what}"] = 1, options.slices
    seconds = measure.interleave(calls, options.rounds)
    return [
        {
            "what": what,
            "volumes_per_second": counts[what][0] / statistics.median(times),
            "slices_per_second": counts[what][1] / statistics.median(times),
            "seconds": statistics.median(times),
            "seconds_spread": measure.spread(times),
        }
        for what, times in seconds.items()
    ]


def against_npy(folder: pathlib.Path, options: flags.FlagValues) -> list[measure.Row]:
    """The cache and .npy files of the same features and labels, read in the same order."""
    rows = []
    order = np.random.default_rng(0).permutation(options.slices)
    for what, size in _features(options).items():
        cache, arrays = write_cache(folder / what, options.slices, size, ["case"])
        paths = []
        for name, array in arrays.items():
            paths.append(folder / what / f"{name}.npy")
            np.save(paths[-1], array)
        mapped = [np.load(path, mmap_mode="r") for path in paths]
        calls = {
            ("single slices", "cache"): lambda c=cache: [c.read_slices("case", VIEW, int(index)) for index in order],
            ("single slices", "npy"): lambda m=mapped: [[np.array(array[index]) for array in m] for index in order],
            ("whole views", "cache"): lambda c=cache: c.read_case("case", VIEW),
            ("whole views", "npy"): lambda p=paths: [np.load(path) for path in p],
            ("first reading", "cache"): lambda c=cache: features.FeatureCache(c.root).read_case("case", VIEW),
            ("first reading", "npy"): lambda p=paths: [np.load(path) for path in p],
        }
        seconds = measure.interleave(calls, options.rounds, warmups=2)
        size_bytes = sum(array.nbytes for array in arrays.values())
        for pattern in ("single slices", "whole views", "first reading"):
            ours, raw = (statistics.median(seconds[pattern, side]) for side in ("cache", "npy"))
            rows.append(
                {
                    "what": f"{pattern}, {what}",
                    "slices": options.slices,
                    "seconds": ours,
                    "seconds_spread": measure.spread(seconds[pattern, "cache"]),
                    "npy_seconds": raw,
                    "npy_seconds_spread": measure.spread(seconds[pattern, "npy"]),
                    "gb_per_second": size_bytes / ours / 1e9,
                    "ratio": raw / ours,
                    "target": None if pattern == "first reading" else RATIO_TARGET,
                }
            )
    return rows


def waiting(folder: pathlib.Path, options: flags.FlagValues) -> list[measure.Row]:
    """CalSAM's step on 16 slices of the tiny SAM's features, from the cache, and on one batch that is there.

    ``waiting`` is the time the loop spends in getting a batch and handing it to the device, of the whole step;
    ``data`` is what the step takes longer than without data, reading threads included that compete for the cores.
    """
    config = configs.TrainConfig(method="calsam")
    case_ids = [f"case{number}" for number in range(6)]
    cache = write_cache(folder, options.slices, TINY, case_ids)[0]
    data = pipeline.training_data(cache, case_ids, [VIEW], config.batch_size, config.seed, config.protocol)
    batches, fixed = iter(data.batches(0)), next(iter(data.batches(0)))
    backbone = models.registry.bind("sam", {})(None, 1)
    mesh, optimizer = sharding.device_mesh(), train_state.make_optimizer(config)
    confidence = losses.registry.bind("cmp", {"threshold": config.cmp.threshold, "temperature": config.cmp.temperature})
    objective = train_step.Objective(expression.parse("sam"), expression.parse("bce"), confidence)
    take = train_step.make_train_step(backbone.decode, backbone.frozen, objective, config, optimizer, mesh)
    state = train_state.init_state(backbone.trainable, optimizer, mesh, None)
    spent: list[float] = []

    def steps(next_batch: Callable[[], Any]) -> None:
        nonlocal state
        waited = 0.0
        for _ in range(options.steps):
            start = time.perf_counter()
            batch = sharding.shard_batch(mesh, next_batch())
            waited += time.perf_counter() - start
            state, measurements = take(state, batch)
            jax.block_until_ready(measurements)
        spent.append(waited)

    calls = {"cache": lambda: steps(lambda: next(batches)), "fixed": lambda: steps(lambda: fixed)}
    waits: list[float] = []

    def cached() -> None:
        calls["cache"]()
        waits.append(spent[-1])

    seconds = measure.interleave({"cache": cached, "fixed": calls["fixed"]}, options.rounds, warmups=2)
    ours, without = (statistics.median(seconds[side]) / options.steps for side in ("cache", "fixed"))
    return [
        {
            "what": f"calsam, {config.batch_size} slices of {'x'.join(map(str, TINY))}",
            "seconds": ours,
            "seconds_spread": [value / options.steps for value in measure.spread(seconds["cache"])],
            "seconds_without_data": without,
            "waiting": statistics.median(waits[-options.rounds :]) / options.steps / ours,
            "data": max(0.0, 1 - without / ours),
            "target": WAITING_TARGET,
        }
    ]


def verification(folder: pathlib.Path, options: flags.FlagValues) -> list[measure.Row]:
    """All volumes once, by as many threads as ``launch.verify`` takes."""
    shape = _volume(options)
    cases = [write_case(folder, f"case{n}", shape, n, ".nii.gz") for n in range(-(-options.volumes // 4))]
    size = sum(path.stat().st_size for path in folder.iterdir())
    dataset = Dataset(folder, tuple(cases), CHANNELS, {"background": 0, "tumour": 1})
    start = time.perf_counter()
    report = verify.verify(dataset)
    seconds = time.perf_counter() - start
    return [
        {
            "what": f"{4 * len(cases)} volumes of {'x'.join(map(str, shape))}, {report.count('error')} errors",
            "seconds": seconds,
            "volumes_per_second": 4 * len(cases) / seconds,
            "megabytes": size / 1e6,
            "workers": min(2 * measure.cores(), verify.MOST_WORKERS),
        }
    ]


def write_case(folder: pathlib.Path, name: str, shape: Sequence[int], seed: int, ending: str) -> Case:
    """Three images and a label that compress as a head does: noise inside of an ellipsoid, zeros around it."""
    grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij", sparse=True)
    radius, lesion_radius = (
        functools.reduce(np.add, [((axis - centre) / size) ** 2 for axis in grid])
        for centre, size in ((0.0, 0.8), (0.3, 0.25))
    )
    lesion = lesion_radius < 1
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    spacing, paths = np.diag([1.0, 1.0, 1.0, 1.0]), {}
    for number, channel in enumerate((*CHANNELS, "label")):
        voxels = np.where(radius < 1, 400 + 100 * number + 200 * lesion + 40 * np.roll(noise, number, 0), 0)
        image = nibabel.Nifti1Image((lesion if channel == "label" else voxels).astype(np.int16), spacing)
        paths[channel] = folder / f"{name}_{channel}{ending}"
        nibabel.save(image, paths[channel])
    return Case(name, name, {channel: paths[channel] for channel in CHANNELS}, paths["label"], "train")


def prepare(case: Case) -> np.ndarray:
    """What training reads of a case: frames of the slices with foreground."""
    class_map = classes.parse("tumour=1", {"background": 0, "tumour": 1})
    options: Mapping[str, Any] = {"config": configs.DataConfig(), "protocol": "gt_points"}
    prepared = preprocessing.prepare_case(
        case, channels=CHANNELS, class_map=class_map, image_size=256, logit_shape=(64, 64), **options
    )
    return frames.to_frame(prepared.images, prepared.geometry, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))


def write_cache(
    folder: pathlib.Path, count: int, size: tuple[int, int, int], case_ids: Sequence[str]
) -> tuple[features.FeatureCache, dict[str, np.ndarray]]:
    """A cache of random features and round labels, and the arrays of its last view."""
    rng = np.random.default_rng(0)
    cache = features.FeatureCache.open(folder / "cache", {})
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, 4 * side) for side in size[:2]), indexing="ij")
    labels = np.broadcast_to(rows**2 + columns**2 < 0.2, (count, *rows.shape)).astype(np.uint8)
    points = np.tile(np.array([[2.0 * size[0], 2.0 * size[0]], [1.0, 1.0]], np.float32), (count, 1, 1))
    prompts = {"gt_points": Prompts(points=points, labels=np.tile(np.array([1, 0], np.int32), (count, 1)))}
    values = rng.standard_normal((count, *size), np.float32).astype(features.BFLOAT16)
    for case_id in case_ids:
        options = {"slices": np.arange(count), "prompts": prompts, "fingerprint": "0"}
        cache.write(case_id, VIEW, features=values, labels=labels, **options)
    return cache, {"features": values.view(np.uint16), "labels": labels}


def _features(options: flags.FlagValues) -> dict[str, tuple[int, int, int]]:
    height, width, channels = (int(size) for size in options.features)
    large = height, width, channels
    return {"x".join(map(str, large)): large, "x".join(map(str, TINY)): TINY}


def _volume(options: flags.FlagValues) -> tuple[int, ...]:
    sizes = options.volume
    if len(sizes) != 3 or any(not size.isdigit() or int(size) < 16 for size in sizes):
        raise UsageError(f"--volume={','.join(sizes)} must be three whole numbers of at least 16.")
    return tuple(int(size) for size in sizes)


if __name__ == "__main__":
    measure.main(define_flags, run)
