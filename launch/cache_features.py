"""Run the frozen encoder once over every labelled slice and keep its features on disk.

python -m launch.cache_features --config.data.root=DATASET --config.data.source=A --workdir=runs/x

``launch.train`` does the same by itself for what is missing; this script is for doing it ahead, on another machine, or
for several runs that share ``--config.data.cache``.  What is there already is read whole: a damaged view is named and
computed anew.  Several of these commands, on one machine or on many that share the folder, fill one cache together.
"""

from pathlib import Path

from absl import flags

from calsegx import configs
from calsegx.training import interruption
from launch import common, components


def cache_features(config: configs.TrainConfig, workdir: Path) -> Path:
    """Fill the cache for training (all views), validation and test cases; returns its folder."""
    parts = components.build(config)
    splits = {"train": config.data.views, "val": 1, "test": 1}
    splits = {split: views for split, views in splits.items() if any(c.split == split for c in parts.dataset.cases)}
    for split in splits:
        parts.select(split)  # every complaint comes before the first encoded slice
    cache = components.feature_cache(parts, workdir)
    with interruption.Stop() as stop:
        components.verify_cache(parts, cache, splits, stop)
        components.fill_cache(parts, cache, splits, stop)
    return cache.root


def define_flags() -> None:
    """``--config.*``, ``--workdir`` and those of several processes."""
    common.define_config()
    common.define_processes()
    common.define_folder("workdir", "Run folder; the cache is <workdir>/features.")


def main() -> None:
    """Fill the cache, and say where it is."""
    root = cache_features(flags.FLAGS.config, Path(flags.FLAGS.workdir))
    print(f"The features are in {root}")


if __name__ == "__main__":
    common.run(main, define_flags)
