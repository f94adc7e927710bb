"""SAM's image encoder in JAX and in PyTorch: seconds, memory, compile time and share of the machine's matmul peak.

python -m benchmarks.encoder --models=vit_b,vit_h --batches=1 --json=FILE

The implementations take turns in one process and medians are reported; quote the ratios.  Nothing is timed before all
agree on the same weights and frames.  Memory and compile time come from a fresh process per implementation.

| implementation      |                                                                                              |
|---------------------|----------------------------------------------------------------------------------------------|
| calsegx             | ``calsegx.models.sam.encode`` as shipped                                                     |
| naive               | the same model in JAX, the logits of a whole grid materialised                               |
| biased xla, cudnn   | ``jax.nn.dot_product_attention``, the relative positions as its bias                         |
| folded xla, cudnn   | the relative positions folded into wider queries and keys (``attention_forms``)              |
| meta                | PyTorch eager, Meta's formulation: ``ratio_to_pytorch`` is relative to it                    |
| sdpa, sdpa compiled | PyTorch's fused attention, the relative positions as its mask; and with ``torch.compile``     |
| transformers sdpa   | ``transformers.SamVisionEncoder``                                                            |

``seconds_spread`` are the quartiles, ``share_of_matmul_peak`` is ``flops / seconds`` over the best large square product
of either framework, ``peak_bytes`` what one encoding adds to weights and frames.
"""

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import encoder_problem as problems  # before jax: it keeps JAX from taking the whole GPU

# isort: split
import numpy as np

from benchmarks import measure
from calsegx.interfaces import InputError, UsageError

FLOAT32_TOLERANCE = 2e-5  # times the largest embedding, at least 1
BFLOAT16_TOLERANCE = 0.05  # root mean square, relative
COLUMNS = {
    "implementation": "",
    "model": "",
    "image_size": "d",
    "batch": "d",
    "dtype": "",
    "seconds": ".4g",
    "images_per_second": ".3g",
    "ratio_to_pytorch": ".2f",
    "ratio_to_transformers_sdpa": ".2f",
    "share_of_matmul_peak": ".2f",
    "peak_mib": ".0f",
    "compile_seconds": ".1f",
    "cached_compile_seconds": ".1f",
    "status": "",
}


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    flags.DEFINE_list("models", ["vit_b"], "Presets: vit_b, vit_l, vit_h.", flag_values=values)
    flags.DEFINE_integer("image_size", 1024, "Side of the encoder frame.", flag_values=values)
    flags.DEFINE_list("batches", ["1"], "Batch sizes.", flag_values=values)
    words = "float32, bfloat16; default: float32 on the CPU, bfloat16 on a GPU."
    flags.DEFINE_list("dtypes", None, words, flag_values=values)
    words = "Timed encodings of each implementation."
    flags.DEFINE_integer("rounds", 7, words, lower_bound=1, flag_values=values)
    words = "Which to compare; default: all that make sense here."
    flags.DEFINE_list("implementations", None, words, flag_values=values)
    words = "Keep only this many blocks, for a quick look."
    flags.DEFINE_integer("depth", None, words, lower_bound=1, flag_values=values)
    words = "Measure memory and compile time, in fresh processes."
    flags.DEFINE_bool("isolated", True, words, flag_values=values)
    flags.DEFINE_string("json", "", "File to write the rows to.", flag_values=values)
    words = "Used by the benchmark itself: measure this one in this process, print JSON."
    flags.DEFINE_string("case", "", words, flag_values=values)


def run(options: flags.FlagValues) -> None:
    """Check, measure, print, write.

    Raises:
        UsageError: for a flag with an unusable value.
        InputError: when two implementations disagree, or none runs here.
    """
    if options.case:
        print(json.dumps(measure_case(**json.loads(options.case))))
        return
    names = options.implementations or problems.default_implementations()
    problems.check_implementations(names)
    dtypes = options.dtypes or (["bfloat16"] if problems.on_gpu() else ["float32"])
    if any(not batch.isdigit() or int(batch) < 1 for batch in options.batches):
        raise UsageError(f"--batches={','.join(options.batches)} must be positive whole numbers.")
    sizes = [
        (model, options.image_size, int(batch), dtype, options.depth)
        for model, dtype, batch in itertools.product(options.models, dtypes, options.batches)
    ]
    for model, image_size, _, dtype, depth in sizes:
        problems.check(model, image_size, dtype, depth)
    peaks = {dtype: problems.matmul_peak(dtype) for dtype in dtypes}
    for dtype, peak in peaks.items():
        words = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in peak.items())
        print(f"Largest rate of a square {dtype} product, GFLOP/s: {words}", flush=True)
    rows = []
    for size in sizes:
        rows += measure_size(size, names, options.rounds, options.isolated, max(peaks[size[3]].values()))
    measure.print_table(rows, COLUMNS)
    if options.json:
        measure.write_json(options.json, rows)
        print(f"The rows are in {options.json}")


def measure_size(
    size: tuple[str, int, int, str, int | None], names: Sequence[str], rounds: int, isolated: bool, peak: float
) -> list[measure.Row]:
    """One row per implementation of one ``size = (model, image size, batch, dtype, depth)``.

    Raises:
        InputError: when two implementations disagree.
    """
    title = "{} at {}, batch {}, {}".format(*size)
    print(f"{title}: building, checking that all agree", flush=True)
    problem = problems.make(*size)
    cases, status = _ready(problem, names, title)
    print(f"{title}: {rounds} rounds of {', '.join(cases)}", flush=True)
    seconds = measure.interleave({name: case.call for name, case in cases.items()}, rounds, warmups=0)
    del cases
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    machine, work = measure.machine(), problems.flops(problem.config, size[2])
    del problem
    rows = []
    for name in names:
        fresh = {}
        if isolated and name in medians:
            print(f"{title}: memory and compile time of {name}", flush=True)
            fresh = _isolated(size, name)
        rows.append(
            {
                "framework": "jax" if name in problems.JAX else "torch",
                "implementation": name,
                "model": size[0],
                "image_size": size[1],
                "batch": size[2],
                "dtype": size[3],
                "depth": size[4],
                "device": machine["device"],
                "seconds": medians.get(name),
                "seconds_spread": measure.spread(seconds[name]) if name in medians else None,
                "images_per_second": size[2] / medians[name] if name in medians else None,
                "ratio_to_pytorch": _ratio(medians, name, problems.REFERENCE),
                "ratio_to_transformers_sdpa": _ratio(medians, name, problems.TRANSFORMERS_SDPA),
                "flops": work,
                "matmul_peak_flops_per_second": peak,
                "share_of_matmul_peak": work / medians[name] / peak if name in medians else None,
                "peak_bytes": fresh.get("peak_bytes"),
                "peak_mib": fresh["peak_bytes"] / 2**20 if fresh.get("peak_bytes") is not None else None,
                "compile_seconds": fresh.get("compile_seconds"),
                "cached_compile_seconds": fresh.get("cached_compile_seconds"),
                "rounds": rounds,
                "jax": machine["jax"],
                "torch": machine["torch"],
                "status": status[name],
            }
        )
    return rows


def measure_case(size: list[Any], name: str) -> measure.Row:
    """Peak memory and compile time of one implementation; call it in a fresh process."""
    case = problems.build(problems.make(*size), name)
    return {"compile_seconds": case.compile_seconds, "peak_bytes": problems.peak_bytes(name, case)}


def _isolated(size: tuple[Any, ...], name: str) -> measure.Row:
    """``measure_case`` in a fresh process with an empty compilation cache, and the compile time of a second one."""
    argument = "--case=" + json.dumps({"size": size, "name": name})
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        row = measure.run_isolated("benchmarks.encoder", [argument], environment)
        if name in problems.JAX:
            again = measure.run_isolated("benchmarks.encoder", [argument], environment)
            row["cached_compile_seconds"] = again["compile_seconds"]
    return row


def _ready(
    problem: problems.Problem, names: Sequence[str], title: str
) -> tuple[dict[str, problems.Case], dict[str, str]]:
    """The implementations that run here, checked against each other, and the status of every one."""
    cases, status, outputs = {}, {}, {}
    for name in names:
        try:
            case = problems.build(problem, name)
            outputs[name] = problems.to_numpy(case.call())
        except (RuntimeError, NotImplementedError) as error:  # of either framework, JaxRuntimeError included
            status[name] = _reason(error)
            print(f"{title}: {name}: {status[name]}", flush=True)
            continue
        cases[name], status[name] = case, "ok"
    if not cases:
        raise InputError(
            f"None of {', '.join(names)} runs {title}: {status}; choose a smaller batch or another device."
        )
    reference = problems.REFERENCE if problems.REFERENCE in cases else next(iter(cases))
    for name in cases:
        deviation, allowed = _deviation(outputs[name], outputs[reference], problem.dtype)
        if not deviation <= allowed:
            raise InputError(
                f"The implementation {name!r} of {title} deviates from {reference!r} by {deviation:.1e}, more than "
                f"{allowed:.1e}; nothing was timed: find out which of the two is wrong."
            )
    return cases, status


def _deviation(out: np.ndarray, reference: np.ndarray, dtype: str) -> tuple[float, float]:
    """How far two embeddings are apart, and how far they may be."""
    if dtype == "float32":
        return float(np.abs(out - reference).max()), FLOAT32_TOLERANCE * max(1.0, float(np.abs(reference).max()))
    rms = float(np.sqrt(np.square(out - reference).mean() / np.square(reference).mean()))
    return rms, BFLOAT16_TOLERANCE


def _reason(error: Exception) -> str:
    """Why an implementation cannot run here; anything but a lack of memory or of a kernel is raised again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    if isinstance(error, NotImplementedError) or "cudnn" in text.lower():
        return "not supported: " + text.strip().splitlines()[0][:160]
    raise error


def _ratio(medians: dict[str, float], name: str, reference: str) -> float | None:
    return medians[name] / medians[reference] if name in medians and reference in medians else None


if __name__ == "__main__":
    measure.main(define_flags, run)
