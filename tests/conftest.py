"""Settings shared by all tests: the CPU, a persistent compilation cache, absl flags, the golden cases."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# The suite's time is compiling; JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run, as .ci/run's second pass does.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Each worker of pytest-xdist has a core to itself.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("MPLBACKEND", "Agg")

from absl import flags  # noqa: E402

from tests import golden_cases  # noqa: E402

# grain's worker processes read absl flags and fail where absl.app.run has not parsed them.
flags.FLAGS.mark_as_parsed()


# JAX keeps what it compiled: a full collection of that heap takes seconds and frees little.
gc.set_threshold(50_000, 20, 100)


def pytest_collection_finish():
    gc.freeze()


def pytest_addoption(parser):
    for name in golden_cases.KINDS:
        text = f"PREFIX.npz and PREFIX.json of other {name} cases for tests/test_golden.py"
        parser.addoption(f"--golden-{name}", metavar="PREFIX", help=text)


def pytest_terminal_summary(terminalreporter):
    reports = [report for found in terminalreporter.stats.values() for report in found]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    records = [value for report in calls for name, value in report.user_properties if name == "golden"]
    if records:
        terminalreporter.section("golden cases")
        for line in golden_cases.table(records):
            terminalreporter.write_line(line)
