"""The main job from nothing: phantoms of two scanners, the frozen tiny SAM, four ways to train its decoder, a report.

python -m launch.demo --workdir=runs/demo            # one seed, a few minutes on two cores
python -m launch.demo --workdir=runs/demo3 --seeds=3  # three seeds, for the spread

It calls the functions of the other scripts, in their order: make_phantoms, cache_features, train, evaluate, predict.
Each stage is skipped or resumed where an earlier, interrupted call left off.
"""

import dataclasses
import time
from pathlib import Path

from absl import flags

from calsegx import configs
from calsegx.evaluation import report
from calsegx.training import checkpoints
from launch import cache_features, common, evaluate, make_phantoms, predict, train

METHODS = ("sam_ft", "sam_fip", "sam_cmp", "calsam")
SEEDS = (42, 2024, 3407)  # of the paper


def demo_config(root: Path, cache: Path) -> configs.TrainConfig:
    """The demo's settings: whole tumour, scanner A to scanner B, short training."""
    return configs.TrainConfig(
        steps=200,
        batch_size=16,
        validate_every=100,
        save_every=100,
        data=configs.DataConfig(
            root=str(root),
            channels="T1c,T2,FLAIR",
            classes="whole_tumour=1+2+3",
            source="A",
            cache=str(cache),
        ),
        optimizer=configs.OptimizerConfig(learning_rate=7e-4),
    )


def demo(workdir: Path, seeds: int) -> report.Record:
    """All stages; returns what the report is made of."""
    config = demo_config(workdir / "Dataset001_Phantom", workdir / "features")
    if not Path(config.data.root).is_dir():
        make_phantoms.make_phantoms(Path(config.data.root))
    cache_features.cache_features(config, workdir)
    runs = []
    for seed in SEEDS[:seeds]:
        for method in METHODS:
            runs.append(workdir / "train" / f"{method}_seed{seed}")
            if not (runs[-1] / "model" / "model.json").exists():
                resume = bool(checkpoints.whole_steps(runs[-1] / "checkpoints"))
                train.train(dataclasses.replace(config, method=method, seed=seed), runs[-1], resume)
    record = evaluate.evaluate(runs, workdir / "evaluation")
    predict.predict(runs[-1], workdir / "predictions", limit=1)
    return record


def define_flags() -> None:
    """``--workdir`` and ``--seeds``."""
    flags.DEFINE_string("workdir", "runs/demo", "Folder for everything the demo writes.")
    flags.DEFINE_integer("seeds", 1, "How many of the seeds 42, 2024, 3407 to train.", lower_bound=1, upper_bound=3)


def main() -> None:
    """Run it, and say what came out and where it is."""
    start, workdir = time.monotonic(), Path(flags.FLAGS.workdir)
    record = demo(workdir, flags.FLAGS.seeds)
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")
    print(report.headline(record))
    print(f"The report is {workdir / 'evaluation' / 'report.html'}")


if __name__ == "__main__":
    common.run(main, define_flags)
