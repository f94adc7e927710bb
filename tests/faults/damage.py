"""Flipped bits, cut and deleted files, in every kind of stored file of a finished run.

python -m tests.faults.damage --count=300

Each damage must be noticed by what reads the file: an error in one sentence, or something else is taken and that is
said.  A damage that changes no number (a blank in a JSON file) may pass, and is counted apart.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calsegx import configs, sharding
from calsegx.calibrators import storage
from calsegx.data import cases as case_tools
from calsegx.features import FeatureCache
from calsegx.interfaces import Case, InputError
from calsegx.models import sam
from calsegx.training import checkpoints, metrics_log, model_folder
from calsegx.training import state as train_state
from launch import components, train
from tests.faults import jobs

ERROR, FALLBACK, HARMLESS = "error", "something else taken and said", "no number changed"
DAMAGES = ("flip", "cut", "delete")


class Site:
    """A finished run with its cache, its evaluation and a saved calibrator, and what they say undamaged."""

    def __init__(self, inputs: jobs.Inputs, evaluate: bool = True):
        self.inputs, self.workdir = inputs, inputs.folder / "run"
        self.evaluation, self.calibrator = inputs.folder / "evaluation", inputs.folder / "calibrator.json"
        self.features = self.workdir / "features"
        if not self.workdir.exists():
            code, said = jobs.run(inputs, inputs.arguments(self.workdir, method="sam_ft"))
            jobs.expect(code == 0, said)
        if evaluate:
            flags = [f"--runs={self.workdir}", f"--workdir={self.evaluation}"]
            code, said = jobs.run(inputs, flags, script="launch.evaluate")
            jobs.expect(code == 0, said)
        storage.save(self.calibrator, "temperature", {"temperature": 1.25, "provenance": {"cases": ["a", "b"]}})
        recorded = model_folder.load(self.workdir)[1]["config"]
        self.config = configs.from_dict(configs.TrainConfig, recorded)
        self.parts = components.build(self.config)
        backbone, optimizer = self.parts.backbone, train_state.make_optimizer(self.config)
        state = train_state.init_state(backbone.trainable, optimizer, sharding.device_mesh(), None)
        self.abstract = train_state.abstract_state(state)
        self.position = checkpoint_position(self.workdir)
        self.expected: dict[str, Any] = {}

    def same(self, name: str, found: Any) -> bool:
        """Whether what was read equals, to the bit, what was read the first time (undamaged)."""
        flat = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)], repr(jax.tree.structure(found))
        return flat == self.expected.setdefault(name, flat)


def checkpoint_position(workdir: Path) -> dict[str, Any]:
    """Where the log was at the last checkpoint."""
    newest = max(checkpoints.whole_steps(workdir / "checkpoints"))
    return json.loads((workdir / "checkpoints" / str(newest) / "record" / "metadata").read_text())["memory"]["log"]


# ---------------------------------------------------------------------- what reads a file, and what it makes of damage
def read_checkpoint(site: Site) -> str:
    """What --resume does: the newest whole checkpoint, and a sentence about those that are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        shutil.copytree(site.workdir / "checkpoints", folder)
        with checkpoints.Checkpoints(folder) as saved:
            step = saved.latest_step()
            state, memory, _ = saved.restore(step, site.abstract, {}, allow_config_change=True)
            jobs.expect(site.same(f"step {step}", (state, memory)), f"step {step} was read and is another")
            if step == 12:
                return HARMLESS
            jobs.expect(step == 9 and "Step 12 was skipped: " in "".join(saved.skipped), f"{step}, {saved.skipped}")
    return FALLBACK


def read_cache(site: Site) -> str:
    """What training and evaluation do before and while they read: every slice of every view."""
    cache = components.feature_cache(site.parts, site.workdir)
    absent = 0
    tested = [("test", ("view0",))] if site.evaluation.exists() else []
    for split, views in [("train", ("view0", "view1")), ("val", ("view0",)), *tested]:
        for case in site.parts.select(split):
            for view in views:
                found = read_view(cache, case, view)
                if found is None:
                    absent += 1  # and is computed again, which tests/training/test_caching.py proves
                else:
                    jobs.expect(site.same(f"{case.case_id}/{view}", found), f"{case.case_id}, {view} is another")
    return FALLBACK if absent else HARMLESS


def read_view(cache: FeatureCache, case: Case, view: str) -> Any:
    """The view, or None where there is none; one that was found damaged is put back in its place for what follows."""
    try:
        there = cache.has(case.case_id, view, case_tools.fingerprint(case))
        return cache.read_case(case.case_id, view) if there else None
    except InputError:
        put_back(cache.root / case.case_id / view)
        raise


def put_back(view: Path) -> None:
    """Undo that a view was set aside."""
    view.with_name(f"{view.name}.set-aside").rename(view)


def read_model(site: Site) -> str:
    """What evaluation and prediction read."""
    jobs.expect(site.same("model", model_folder.load(site.workdir)), "another model was read")
    return HARMLESS


def read_log(site: Site) -> str:
    """What evaluation reads, and what --resume goes on with."""
    path, said = site.workdir / "metrics.jsonl", []
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / path.name
        if path.exists():
            shutil.copy(path, copy)
        metrics_log.MetricsLog(copy, site.position, say=said.append)
        jobs.expect(said or site.same("resumed log", copy.read_bytes()), "the log that is gone on with is another")
    position = model_folder.load(site.workdir)[1]["log"]
    found = metrics_log.read(path, position)
    jobs.expect(said or site.same("log", found), "another log was read")
    return FALLBACK if said else HARMLESS


def read_weights(site: Site) -> str:
    """What every script reads of SAM."""
    jobs.expect(site.same("weights", sam.load(site.inputs.weights)[1]), "other weights were read")
    return HARMLESS


def read_calibrator(site: Site) -> str:
    """A saved calibrator."""
    jobs.expect(site.same("calibrator", storage.load(site.calibrator)), "another calibrator was read")
    return HARMLESS


def read_dataset(site: Site) -> str:
    """Files that a person writes carry no checksum: an error, or --resume refuses because the data are others."""
    parts = components.build(site.config)
    cases = [
        (split, case.case_id, case_tools.fingerprint(case))
        for split in ("train", "val")
        for case in parts.select(split)
    ]
    if site.same("dataset", (cases, parts.channels, parts.class_map.names, parts.class_map.ids)):
        return HARMLESS
    return resume(site)


def resume(site: Site) -> str:
    """The real --resume, on a copy of the run."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "run"
        shutil.copytree(site.workdir, copy)
        train.train(site.config, copy, resume=True)
        jobs.expect(site.same("resumed", model_folder.load(copy)[0]), "the run went on with other data")
    return HARMLESS


def check_evaluation(site: Site) -> str:
    """No script reads an evaluation; who reports from one checks it with SHA256SUMS."""
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=site.evaluation, capture_output=True, text=True
    )
    listed = sorted(line.partition(":")[0] for line in check.stdout.splitlines())
    whole = listed == sorted(path.name for path in site.evaluation.iterdir() if path.name != "SHA256SUMS")
    return HARMLESS if check.returncode == 0 and whole else ERROR


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stored file: where such files are (relative to the site's folder), who reads them, and its share."""

    pattern: str
    read: Callable[[Site], str]
    share: int  # of 300


KINDS = {
    "checkpoint: state": Kind("run/checkpoints/12/state/**/*", read_checkpoint, 30),
    "checkpoint: record": Kind("run/checkpoints/12/record/*", read_checkpoint, 10),
    "checkpoint: metrics": Kind("run/checkpoints/12/metrics/*", read_checkpoint, 10),
    "checkpoint: manifest": Kind("run/checkpoints/12/manifest.json", read_checkpoint, 15),
    "checkpoint: Orbax's own": Kind("run/checkpoints/12/[_c]*", read_checkpoint, 10),
    "cache: chunk": Kind("run/features/*/*/*/c/**/*", read_cache, 40),
    "cache: zarr.json": Kind("run/features/*/*/*/zarr.json", read_cache, 25),
    "cache: done.json": Kind("run/features/*/*/done.json", read_cache, 20),
    "cache: signature.json": Kind("run/features/signature.json", read_cache, 15),
    "model: decoder.safetensors": Kind("run/model/decoder.safetensors", read_model, 15),
    "model: model.json": Kind("run/model/model.json", read_model, 20),
    "log: metrics.jsonl": Kind("run/metrics.jsonl", read_log, 20),
    "SAM: model.safetensors": Kind("sam/model.safetensors", read_weights, 10),
    "SAM: config.json, SHA256SUMS, card": Kind("sam/[!m]*", read_weights, 15),
    "calibrator": Kind("calibrator.json", read_calibrator, 15),
    "dataset: cases.tsv": Kind("Dataset001_Phantom/cases.tsv", read_dataset, 20),
    "dataset: dataset.json": Kind("Dataset001_Phantom/dataset.json", read_dataset, 10),
    "dataset: images and labels": Kind("Dataset001_Phantom/*Tr/*_A*", read_dataset, 10),
    "evaluation": Kind("evaluation/*", check_evaluation, 20),
    "run: config.json": Kind("run/config.json", resume, 3),
}


@contextlib.contextmanager
def damaged(path: Path, how: str, rng: random.Random) -> Iterator[str]:
    """Inside it the file is damaged; afterwards it is as before.  Yields what was done."""
    content = path.read_bytes()
    try:
        if how == "delete" or not content:
            path.unlink()
            done = "deleted"
        elif how == "cut":
            length = rng.randrange(len(content))
            path.write_bytes(content[:length])
            done = f"cut from {len(content)} to {length} bytes"
        else:
            place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            done = f"byte {place} changed by {bit}"
        yield done
    finally:
        path.write_bytes(content)


def try_damage(site: Site, kind: Kind, path: Path, how: str, rng: random.Random) -> tuple[str, str]:
    """Damage a file and read it: what came of it, and the sentence that was said.

    Raises:
        Failure: when the damage was not noticed and changed what was read, or was noticed without a sentence.
    """
    with damaged(path, how, rng) as done:
        where = f"{path.relative_to(site.inputs.folder)}, {done}"
        try:
            return kind.read(site), where
        except InputError as error:
            sentence = str(error)
            jobs.expect("\n" not in sentence and len(sentence) > 20, f"{where}: no sentence: {sentence!r}")
            return ERROR, f"{where}: {sentence}"
        except jobs.Failure as failure:
            raise jobs.Failure(f"{where}: not noticed: {failure}") from failure
        except Exception as error:
            raise jobs.Failure(f"{where}: {type(error).__name__} instead of a sentence: {error}") from error


def sweep(
    site: Site, kinds: dict[str, int], seed: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, collections.Counter]:
    """As many damages of each kind as asked for, at random places, each way in turn; what came of them by kind.

    Raises:
        Failure: listing all that were not noticed.
    """
    rng, failures, results = random.Random(seed), [], {}
    for name, count in kinds.items():
        kind, results[name] = KINDS[name], collections.Counter()
        paths = sorted(path for path in site.inputs.folder.glob(kind.pattern) if path.is_file())
        jobs.expect(paths, f"{name}: no file")
        jobs.expect(kind.read(site) == HARMLESS, f"{name}: undamaged files were refused")
        for number in range(count):
            try:
                found, said = try_damage(site, kind, rng.choice(paths), DAMAGES[number % len(DAMAGES)], rng)
                say(f"{name}: {found}: {said}")
                results[name][found] += 1
            except jobs.Failure as failure:
                failures.append(f"{name}: {failure}")
        jobs.expect(kind.read(site) == HARMLESS, f"{name}: files differ after the damage was undone")
    jobs.expect(not failures, "\n".join([f"{len(failures)} damages were not noticed:", *failures]))
    return results


def end_to_end(site: Site) -> int:
    """Whole scripts on damaged files: nothing is trained on or reported from; returns how many were run."""
    inputs, rng = site.inputs, random.Random(0)
    chunk = sorted(site.features.glob("*/view0/features/c/*/*/*/*"))[0]
    with damaged(chunk, "flip", rng):
        fresh = inputs.folder / "fresh"
        code, said = jobs.run(inputs, inputs.arguments(fresh, method="sam_ft", **{"data.cache": site.features}))
        jobs.expect(code == 1 and "are damaged" in said and not (fresh / "model").exists(), f"{code}: {said}")
        put_back(site.features.joinpath(*chunk.relative_to(site.features).parts[:2]))
    with damaged(site.workdir / "model" / "model.json", "flip", rng):
        evaluation = inputs.folder / "other"
        flags = [f"--runs={site.workdir}", f"--workdir={evaluation}"]
        code, said = jobs.run(inputs, flags, script="launch.evaluate")
        jobs.expect(code == 1 and "is damaged" in said and not list(evaluation.glob("*")), f"{code}: {said}")
    copy = inputs.folder / "copy"
    shutil.copytree(site.workdir, copy)
    shutil.rmtree(copy / "model")
    with damaged(max((copy / "checkpoints" / "12").rglob("d/*")), "flip", rng):
        code, said = jobs.run(inputs, [*inputs.arguments(copy, method="sam_ft"), "--resume"])
    jobs.expect(code == 0 and "Step 12 was skipped" in said and "from step 9 to 12" in said, f"{code}: {said}")
    models = [(run / "model" / "decoder.safetensors").read_bytes() for run in (site.workdir, copy)]
    jobs.expect(models[0] == models[1], "the run that took step 9 ended with another model")
    return 3


def main() -> None:
    """Run everything and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="damages in all, about")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--verbose", action="store_true", help="print every damage and what was said")
    arguments = parser.parse_args()
    start = time.monotonic()
    counts = {name: max(1, round(kind.share * arguments.count / 300)) for name, kind in KINDS.items()}
    with tempfile.TemporaryDirectory(prefix="damage_") as name:
        site = Site(jobs.make_inputs(Path(name)))
        print(f"a finished run and its evaluation: {time.monotonic() - start:.0f} s", flush=True)
        say = functools.partial(print, flush=True) if arguments.verbose else lambda line: None
        results = sweep(site, counts, arguments.seed, say)
        scripts = end_to_end(site)
    _print(results)
    total = sum(sum(found.values()) for found in results.values())
    print(f"{total} damages, all noticed or without effect; {scripts} scripts; {time.monotonic() - start:.0f} s")


def _print(results: dict[str, collections.Counter]) -> None:
    columns: Sequence[str] = (ERROR, FALLBACK, HARMLESS)
    print(f"{'':36s}" + "".join(f"{column:>32s}" for column in columns))
    for name, found in results.items():
        print(f"{name:36s}" + "".join(f"{found[column]:32d}" for column in columns))


if __name__ == "__main__":
    main()
