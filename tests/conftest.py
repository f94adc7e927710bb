"""Settings shared by all tests: the CPU, a persistent compilation cache, absl flags marked as parsed."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLBACKEND", "Agg")

from absl import flags  # noqa: E402

# grain's worker processes read absl flags and fail where absl.app.run has not parsed them.
flags.FLAGS.mark_as_parsed()
