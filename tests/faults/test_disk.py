"""Every injected write once, where it is cheap; ``tests/faults/disk.py`` does it to whole runs."""

import errno
import gc
import resource
import shutil

import jax
import numpy as np
import pytest

from calsegx import features, files, sharding
from calsegx.interfaces import InputError
from calsegx.training import checkpoints, metrics_log, model_folder
from calsegx.training import state as train_state
from tests.faults import disk
from tests.training import toy

OPERATIONS = ("open", "write", "fsync", "rename")
EACH = [(name, error) for name in OPERATIONS for error in (errno.ENOSPC, errno.EIO)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("operation", "error"), EACH)
def test_a_file(operation, error, tmp_path):
    path = tmp_path / "report.html"
    files.write_atomically(path, "old")
    with disk.Fault(tmp_path, operation, "*report*", error=error), pytest.raises(InputError, match="cannot be written"):
        files.write_atomically(path, "new")
    assert contents(tmp_path) == {"report.html": b"old"}
    files.write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(("operation", "error"), [*EACH, ("mkdir", errno.ENOSPC)])
def test_a_view_of_the_cache(operation, error, tmp_path):
    cache = features.FeatureCache.open(tmp_path / "cache", toy.SIGNATURE)
    cache.write("a", "view0", **toy.records(3, 0), fingerprint="old")
    before = contents(tmp_path)
    with disk.Fault(tmp_path, operation, "cache/a/*", error=error), pytest.raises(InputError, match="written"):
        cache.write("a", "view0", **toy.records(3, 1), fingerprint="new")
    assert contents(tmp_path) == before
    cache.write("a", "view0", **toy.records(3, 1), fingerprint="new")
    assert cache.has("a", "view0", "new")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", ["open", "write", "fsync"])
def test_the_log(operation, error, tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics_log.MetricsLog(path)
    log.write(1, {"loss": 1.0})
    position = log.position()
    with disk.Fault(tmp_path, operation, "metrics.jsonl", error=error), pytest.raises(InputError, match="--resume"):
        log.write(2, {"loss": 0.5})
        log.position()
    said = []
    resumed = metrics_log.MetricsLog(path, position, say=said.append)
    resumed.write(2, {"loss": 0.5})
    assert [entry["loss"] for entry in metrics_log.read(path, resumed.position())] == [1.0, 0.5] and not said


@pytest.mark.parametrize(("operation", "error"), EACH)
@pytest.mark.parametrize("name", ["decoder.safetensors", "README.md", "model.json"])
def test_the_model(name, operation, error, tmp_path):
    record = {"config": {**toy.configs.to_dict(toy.config())}, "cases": [], "backbone": "toy"}
    params = {"kernel": np.ones((2, 3), np.float32)}
    with disk.Fault(tmp_path, operation, f"*{name}*", error=error), pytest.raises(InputError, match=f"{name} cannot"):
        model_folder.save(tmp_path, params, record)
    with pytest.raises(InputError, match="holds no trained model"):
        model_folder.load(tmp_path)
    model_folder.save(tmp_path, params, record)
    np.testing.assert_array_equal(model_folder.load(tmp_path)[0]["kernel"], 1)


@pytest.fixture
def collected():
    """Of a save that failed Orbax leaves coroutines behind, which complain when they are collected: here, not later."""
    yield
    gc.collect()


def a_save_fails(test):
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")(test)
    return pytest.mark.usefixtures("collected")(test)


def a_state():
    optimizer = train_state.make_optimizer(toy.config())
    return train_state.init_state(toy.backbone().trainable, optimizer, sharding.device_mesh(jax.devices()[:1]))


@a_save_fails
@pytest.mark.parametrize(
    ("operation", "pattern"),
    [
        ("write", "*manifest.json*"),
        ("rename", "*manifest.json*"),
        ("fsync", "4/*"),
        ("write", "*record*"),
        ("rename", "4"),
        ("mkdir", "4.orbax*"),
    ],
)
def test_a_checkpoint(operation, pattern, tmp_path):
    refused(tmp_path, lambda: disk.Fault(tmp_path, operation, pattern))


class LimitedFiles:
    """No file of this process may grow beyond ``size`` bytes: the writes of TensorStore's C++ are cut short too."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@a_save_fails
@pytest.mark.parametrize("size", [0, 1000])
def test_a_checkpoint_with_limited_files(size, tmp_path):
    refused(tmp_path, lambda: LimitedFiles(size))


def refused(folder, fault):
    """A save that fails is a sentence; the checkpoint before it stays whole, and the next run goes on from it."""
    state = a_state()
    with checkpoints.Checkpoints(folder) as saved:
        saved.save(2, state, {"seed": 1}, {})
    sentence = "checkpoint of step 4 cannot be written .*step 2 is kept; free some space"
    with pytest.raises(InputError, match=sentence), checkpoints.Checkpoints(folder) as saved, fault():
        saved.save(4, state, {"seed": 1}, {})
        saved.wait()
    assert checkpoints.whole_steps(folder) == [2]
    # The next run is another process: here Orbax's threads may still be at work in the folder of the save that failed.
    again = shutil.copytree(folder, folder / "again", ignore=shutil.ignore_patterns("*tmp*"))
    with checkpoints.Checkpoints(again) as saved:
        restored, _, _ = saved.restore(2, train_state.abstract_state(state), {"seed": 1})
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        saved.save(4, state, {"seed": 1}, {})
    assert checkpoints.whole_steps(again) == [2, 4]


@pytest.mark.slow
def test_a_full_file_system(inputs, whole, tmp_path):
    """A whole run on a disk that fills up; when there is space again it ends like an undisturbed one."""
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    try:
        with disk.small_disk(tmp_path / "disk", 4 * needed) as small:
            ballast = disk.fill(small, needed // 2)
            said = disk.survive(inputs, small / "run", whole, int, ballast.unlink)
    except PermissionError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    assert said.startswith("error: ") and "free some space" in said
