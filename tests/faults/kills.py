"""kill -9, signals and two processes on one folder, against a run that nobody disturbed.

python -m tests.faults.kills --count=100

Training (CalSAM and CRaC) and cache filling are killed at random moments and started again until the work is done.
Every start must succeed, and what is there at the end must equal what an undisturbed run leaves, bit for bit.
"""

import argparse
import collections
import json
import random
import shutil
import signal
import tempfile
import threading
import time
import warnings
from concurrent import futures
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from calsegx.training import checkpoints
from tests.faults import jobs

# Kind of job: its script and options.
KINDS = {
    "calsam": ("launch.train", {"method": "calsam"}),
    "crac": ("launch.train", {"method": "crac"}),
    "sam_ft": ("launch.train", {"method": "sam_ft"}),
    "cache": ("launch.cache_features", {"data.views": 6}),
}
# When to kill: after which line, and at most how many seconds later; how often it is chosen.
MOMENTS = {
    "start": ("", 1.5, 1),  # from the first moment
    "encoding": ("Feature cache", 1.0, 2),
    "compiling": ("Training", 5.0, 1),
    "training": ("/12 steps", 1.0, 2),
    "saving": ("saved step", 1.5, 5),
}
_reading = threading.Lock()  # ``catch_warnings`` is for one thread at a time


def kill_until_done(inputs: jobs.Inputs, folder: Path, kind: str, whole: Path, count: int, seed: int) -> dict:
    """Kill jobs of one kind ``count`` times, let every one of them end, and compare.

    Returns:
        How often it was killed at which moment (``"calsam, encoding"``), and the number of jobs that ended.
    """
    rng, done = random.Random(seed), collections.Counter()
    script, options = KINDS[kind]
    names = [name for name in MOMENTS if kind != "cache" or name in ("start", "encoding")]
    kills = 0
    while kills < count or not done["jobs that ended"]:
        workdir = folder / f"{kind}_{seed}_{done['jobs that ended']}"
        arguments = inputs.arguments(workdir, **options)
        ended = False
        while not ended:
            resume = kind != "cache" and bool(checkpoints.whole_steps(workdir / "checkpoints"))
            job = jobs.Job(inputs, [*arguments, *(["--resume"] if resume else [])], script=script)
            if kills < count:
                name = rng.choices(names, [MOMENTS[n][2] for n in names])[0]
                text, most, _ = MOMENTS[name]
                if job.wait_for(text):
                    time.sleep(rng.uniform(0, most))
                job.send(signal.SIGKILL)
            code = job.wait()
            ended = code == 0
            jobs.expect(code in (0, -signal.SIGKILL), f"{kind}: a start failed with code {code}: {job.said()[-500:]}")
            if not ended:
                kills += 1
                done[f"{kind}, {name}"] += 1
                done["resumed from a checkpoint"] += resume
        compare(workdir, whole)
        done["jobs that ended"] += 1
        shutil.rmtree(workdir)
    return done


def compare(workdir: Path, whole: Path) -> None:
    """Cache, last checkpoint, log (without seconds) and model are bit for bit those of the undisturbed run."""
    cache, expected = _contents(workdir / "features"), _contents(whole / "features")
    different = [name for name in sorted(cache.keys() | expected.keys()) if cache.get(name) != expected.get(name)]
    jobs.expect(not different, f"{workdir}: the cache differs in {different[:5]}")
    if not (whole / "metrics.jsonl").exists():
        return
    steps = [checkpoints.whole_steps(run / "checkpoints") for run in (workdir, whole)]
    jobs.expect(steps[0] == steps[1], f"{workdir}: checkpoints {steps[0]} instead of {steps[1]}")
    for step in steps[1]:
        mine, theirs = (_checkpoint(run / "checkpoints" / str(step)) for run in (workdir, whole))
        different = [name for name in theirs if mine.get(name) != theirs[name]]
        jobs.expect(mine.keys() == theirs.keys() and not different, f"{workdir}, step {step}: {different} differ")
    jobs.expect(log(workdir) == log(whole), f"{workdir}: metrics.jsonl differs")
    weights = [(run / "model" / "decoder.safetensors").read_bytes() for run in (workdir, whole)]
    jobs.expect(weights[0] == weights[1], f"{workdir}: the model differs")


def log(workdir: Path) -> list[dict]:
    """The entries of ``metrics.jsonl`` without the seconds."""
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden; a kill leaves hidden ones, which nothing reads."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not f"/{name}".count("/.")}


def _checkpoint(folder: Path) -> dict[str, object]:
    """The arrays of a checkpoint as bytes, and what was recorded beside them except for times."""
    with _reading, ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")  # as they lie in the file is all that is asked
        state = reader.restore(folder / "state")
    found: dict[str, object] = {}
    for path, leaf in ocp.tree.to_flat_dict(state).items():
        found["/".join(map(str, path))] = (str(np.asarray(leaf).dtype), np.asarray(leaf).tobytes())
    recorded = json.loads((folder / "record" / "metadata").read_text())
    recorded["memory"].pop("log")  # a position that depends on the digits of the seconds
    recorded["record"]["config"]["data"].pop("cache")
    return found | recorded | {"metrics": (folder / "metrics" / "metrics").read_bytes()}


def signals(inputs: jobs.Inputs, folder: Path, whole: Path, numbers: dict[int, int], kind: str) -> None:
    """Each signal finishes the step, saves it and gives its exit code; the run goes on to the same end."""
    for number, expected in numbers.items():
        workdir = folder / f"signal_{number}"
        arguments = inputs.arguments(workdir, **KINDS[kind][1])
        job = jobs.Job(inputs, arguments)
        jobs.expect(job.wait_for("/12 steps"), f"training did not start: {job.said()[-500:]}")
        job.send(number)
        code = job.wait()
        steps = checkpoints.whole_steps(workdir / "checkpoints")
        jobs.expect(code == expected, f"signal {number} gave the exit code {code}, expected {expected}")
        jobs.expect(steps and f"step {steps[-1]} of 12 is saved" in job.said(), f"not saved: {job.said()[-300:]}")
        code, said = jobs.run(inputs, [*arguments, "--resume"])
        jobs.expect(code == 0 and f"from step {steps[-1]} to 12" in said, f"the resume failed: {said[-500:]}")
        jobs.expect(log(workdir) == log(whole), "the log differs")
        weights = [(run / "model" / "decoder.safetensors").read_bytes() for run in (workdir, whole)]
        jobs.expect(weights[0] == weights[1], "the model differs")


def second_signal(inputs: jobs.Inputs, folder: Path) -> float:
    """The second signal ends the process at once, here while it compiles; returns the seconds that took."""
    job = jobs.Job(inputs, inputs.arguments(folder / "second", "sam_ft", steps=10_000))
    jobs.expect(job.wait_for("Training"), f"training did not start: {job.said()[-500:]}")
    job.send(signal.SIGTERM)
    time.sleep(0.05)  # two at the same instant are one to the system
    start = time.monotonic()
    job.send(signal.SIGTERM)
    code = job.wait()
    seconds = time.monotonic() - start
    jobs.expect(code in (143, -signal.SIGTERM) and seconds < 2, f"exit code {code} after {seconds:.1f} s")
    return seconds


def two_processes(inputs: jobs.Inputs, folder: Path) -> None:
    """The second process on a run folder refuses; after kill -9 of the first the folder is free."""
    workdir = folder / "shared"
    arguments = inputs.arguments(workdir, "sam_ft", steps=10_000)
    first = jobs.Job(inputs, arguments)
    jobs.expect(first.wait_for("Feature cache"), f"it did not start: {first.said()[-500:]}")
    code, said = jobs.run(inputs, arguments)
    wanted = f"error: {workdir} is in use by another process ({first.process.pid} on "
    jobs.expect(code == 1 and wanted in said, f"the second process was not refused: {code}, {said[-300:]}")
    first.send(signal.SIGKILL)
    first.wait()
    third = jobs.Job(inputs, arguments)
    jobs.expect(third.wait_for("Training"), f"the folder was not free: {third.said()[-500:]}")
    third.send(signal.SIGKILL)
    third.wait()


def main() -> None:
    """Run everything and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=2, help="jobs at the same time")
    arguments = parser.parse_args()
    start = time.monotonic()
    kinds = ["calsam", "crac", "cache", "calsam", "crac", "cache", "calsam", "crac", "cache", "cache"]
    with tempfile.TemporaryDirectory(prefix="kills_") as name:
        folder = Path(name)
        inputs = jobs.make_inputs(folder)
        for kind in dict.fromkeys(kinds):
            script, options = KINDS[kind]
            code, said = jobs.run(inputs, inputs.arguments(folder / f"whole_{kind}", **options), script=script)
            jobs.expect(code == 0, said)
        print(f"undisturbed runs: {time.monotonic() - start:.0f} s", flush=True)
        done = collections.Counter()
        with futures.ThreadPoolExecutor(arguments.workers) as pool:
            shares = [arguments.count // 10 + (i < arguments.count % 10) for i in range(10)]
            running = [
                pool.submit(kill_until_done, inputs, folder, kind, folder / f"whole_{kind}", share, arguments.seed + i)
                for i, (kind, share) in enumerate(zip(kinds, shares, strict=True))
                if share
            ]
            for future in futures.as_completed(running):
                done.update(future.result())
                print(f"{_kills(done)} kills, {time.monotonic() - start:.0f} s", flush=True)
        for what, number in sorted(done.items()):
            print(f"{number:5d}  {what}")
        codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
        signals(inputs, folder, folder / "whole_calsam", codes, "calsam")
        print("SIGTERM, SIGINT and SIGUSR1: saved, exit codes 143, 130 and 143, and gone on with to the same end")
        print(f"a second signal: {second_signal(inputs, folder):.2f} s")
        two_processes(inputs, folder)
        print("two processes: the second is refused, and after kill -9 of the first the folder is free")
    print(f"{_kills(done)} kills, every start succeeded, every end bit for bit; {time.monotonic() - start:.0f} s")


def _kills(done: collections.Counter) -> int:
    return sum(number for what, number in done.items() if "," in what)


if __name__ == "__main__":
    main()
