"""The price of the Fisher penalty, PyTorch and JAX side by side, in three tables.

python -m benchmarks.fisher_penalty --json=FILE --markdown=FILE

1. The decoder's training step (loss and gradients, everything resident on the device): every mode of
   ``calsegx.losses.fisher``, PyTorch eager and ``torch.compile``, taking turns in one run.  Nothing is timed before
   loss, penalty and every gradient of the two frameworks agree.
2. The frozen encoder inside the step.  3. Online against cached training, per epoch.

Neither grain, nibabel nor transformers is imported.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from absl import flags

from benchmarks import fisher_problem as problems  # before jax: it keeps JAX from taking the whole GPU

# isort: split
import jax
import numpy as np

from benchmarks import measure, torch_decoder, torch_fisher, whole_step
from calsegx import files
from calsegx.interfaces import InputError, Params, UsageError
from calsegx.models.sam import presets

Key = tuple[str, str]  # framework, mode
Gradients = dict[Key, Params]

TOLERANCE = 1e-4  # relative, of loss, penalty and each parameter's gradient (L2)
LOW_PRECISION_TOLERANCE = 0.1  # of the whole gradient in tfloat32 and bfloat16, for torch.compile
FLOOR = 1e-6  # of a parameter's gradient against the whole: attention key biases have an analytically zero gradient
COLUMNS = {
    **{name: "" for name in ("framework", "mode", "preset", "grid", "batch", "classes", "dtype")},
    **{"seconds": ".4f", "ratio_to_plain": ".2f", "ratio_to_pytorch": ".2f", "flops": ".3g", "peak_bytes": ".3g"},
    **{"gradient_error": ".1e", "mean_gradient_error": ".1e", "penalty_gradient_error": ".1e", "status": ""},
}


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    define = functools.partial(flags.DEFINE_string, flag_values=values)
    define("json", "", "File to write the rows to.")
    define("markdown", "", "File to write the tables to.")
    define("isolated", "", "Used by the benchmark itself: measure the peak memory of this case, print JSON.")
    listed = functools.partial(flags.DEFINE_list, flag_values=values)
    listed("tables", ["1", "2", "3"], "Which tables to make.")
    listed("grids", ["64", "32", "16", "tiny"], "Feature grids; 64: SAM at 1024 pixels; tiny: the preset of the demo.")
    listed("batches", ["1", "2", "4"], "Batch sizes.")
    listed("tiny_batches", ["16"], "Batch sizes of the grid tiny.")
    listed("classes", ["1", "4"], "Numbers of foreground classes.")
    listed("dtype", ["float32"], "Matrix products: float32; on a GPU also tfloat32, bfloat16.")
    listed("modes", list(problems.MODES), "Rows of JAX; PyTorch has those of them that it can.")
    listed("compile", ["plain", "exact"], "Rows of torch.compile: minutes of compilation each on a CPU.")
    listed("encoders", ["vit_b"], "Tables 2 and 3: encoders to measure; without vit_h the last one stands in for it.")
    number = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    number("rounds", 9, "Timed calls per row of table 1.")
    number("draws", 32, "Steps whose mean gradient is compared, of stochastic and every_k.")
    number("whole_rounds", 5, "Timed calls per row of tables 2 and 3.")
    number("training_batch", 4, "Table 3: batch of the decoder step.")
    number("slices", 1000, "Table 3: training slices.")
    number("views", 2, "Table 3: cached views of each slice.")
    number("epochs", 20, "Table 3: epochs that share the cached features.")
    number("read_slices", 48, "Table 3: slices written and read to time the disk.")
    words = "Peak memory: XLA's buffers (PyTorch: none), or a fresh process per row."
    flags.DEFINE_enum("peak", "xla", ["xla", "process"], words, flag_values=values)


def same_gradients(ours: Params, theirs: Params) -> list[str]:
    """The parameters whose gradients differ by more than the tolerance, with their relative difference."""
    whole = _norm(theirs)
    names = torch_decoder.weights.flatten(theirs)
    wrong = []
    for (name, b), a in zip(names.items(), jax.tree.leaves(ours), strict=True):
        difference = np.linalg.norm(np.asarray(a, np.float64) - b)
        if not difference <= TOLERANCE * np.linalg.norm(b) + FLOOR * whole:
            wrong.append(f"{name} ({difference / max(np.linalg.norm(b), 1e-300):.1e})")
    return wrong


def check_agreement(problem: problems.Problem, modes: Sequence[str] = ("plain", "exact", "cmp")) -> Gradients:
    """Loss, penalty and gradients of both frameworks, float32; gradients by (framework, mode).

    Raises:
        InputError: when they disagree: a time would compare two different things.
    """
    gradients: Gradients = {}
    for mode in modes:
        positional, keywords = problems.jax_arguments(problem)
        (_, measured), ours = problems.jax_step(problem, mode)(*positional, **keywords)
        loss, penalty, theirs = problems.torch_step(problem, "torch", mode)()
        theirs = torch_decoder.to_params(problem.params, theirs)
        pairs = {"loss": (float(measured["loss"]), float(loss))}
        if mode == "exact":
            pairs["penalty"] = float(measured["penalty"]), float(penalty)
        wrong = [f"{k} ({a} and {b})" for k, (a, b) in pairs.items() if not abs(a - b) <= TOLERANCE * abs(b)]
        wrong += [f"gradient of {name}" for name in same_gradients(ours, theirs)]
        if wrong:
            raise InputError(
                f"JAX and PyTorch disagree at grid {problem.grid}, batch {problem.batch}, K={problem.classes}, mode "
                f"{mode}, by more than {TOLERANCE} in {', '.join(wrong)}; nothing is timed until they agree."
            )
        gradients["jax", mode] = jax.tree.map(lambda x: np.asarray(x, np.float64), ours)
        gradients["torch", mode] = theirs
    return gradients


@dataclasses.dataclass
class Case:
    """One row in the making: a blocking call of one step or cycle, and how to get its gradient."""

    call: Callable[[], Any]
    gradient: Callable[[int], Params]  # of the index-th step
    steps: int = 1  # per call
    flops: float | None = None
    peak: int | None = None


def jax_case(problem: problems.Problem, mode: str, dtype: str) -> Case:
    """Compile the step of a mode."""
    step, steps = problems.jax_step(problem, mode, dtype), problems.CYCLES.get(mode, 1)
    arguments = [problems.jax_arguments(problem, i) for i in range(steps)]
    compiled = step.lower(*arguments[0][0], **arguments[0][1]).compile()
    flops, peak = measure.xla_cost(compiled)
    if mode in problems.UNCOUNTED:
        flops = None

    def call() -> None:
        for positional, keywords in arguments:
            jax.block_until_ready(compiled(*positional, **keywords))

    def gradient(index: int) -> Params:
        positional, keywords = problems.jax_arguments(problem, index)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), compiled(*positional, **keywords)[1])

    return Case(call, gradient, steps, flops, peak)


def torch_case(problem: problems.Problem, framework: str, mode: str, dtype: str) -> Case:
    """Build the step of a mode and run it once."""
    step = problems.torch_step(problem, framework, mode, dtype)
    step()
    flops = problems.torch_flops(step) if framework == "torch" else None

    return Case(step, lambda index: torch_decoder.to_params(problem.params, step()[2]), flops=flops)


def rows_of(
    problem: problems.Problem, dtype: str, reference: Gradients, options: flags.FlagValues
) -> Iterator[measure.Row]:
    """The rows of table 1 for one size and one precision."""
    cases: dict[Key, Case] = {}
    refused: dict[Key, str] = {}
    for mode in options.modes:
        say(f"  JAX, {mode}")
        cases["jax", mode] = jax_case(problem, mode, dtype)
    for mode in (mode for mode in options.modes if mode in torch_fisher.MODES):
        say(f"  PyTorch, {mode}")
        cases["torch", mode] = torch_case(problem, "torch", mode, dtype)
        if mode in options.compile:
            say(f"  torch.compile of {mode}")
            try:
                cases["torch.compile", mode] = torch_case(problem, "torch.compile", mode, dtype)
            except RuntimeError as error:  # what dynamo and inductor raise
                refused["torch.compile", mode] = f"unsupported: {type(error).__name__}: {str(error).splitlines()[0]}"
    say(f"  {options.rounds} rounds")
    seconds = measure.interleave({key: case.call for key, case in cases.items()}, options.rounds)
    price = {key: statistics.median(times) / cases[key].steps for key, times in seconds.items()}
    for key in sorted([*cases, *refused], key=lambda key: key[0]):  # stable: the modes keep their order
        framework, mode = key
        row: measure.Row = {
            "table": 1,
            "framework": framework,
            "mode": mode,
            "grid": problem.config.grid,
            "preset": "tiny" if problem.grid == "tiny" else "sam",
            "batch": problem.batch,
            "classes": problem.classes,
            "dtype": dtype,
            **dict.fromkeys(("seconds", "ratio_to_plain", "ratio_to_pytorch", "flops", "peak_bytes", "gradient_error")),
            "status": refused.get(key, "measured"),
            "rounds": options.rounds,
            **measure.machine(),
        }
        if key in cases:
            case = cases[key]
            row |= {
                "seconds": price[key],
                "seconds_spread": [value / case.steps for value in measure.spread(seconds[key])],
                "ratio_to_plain": _ratio(price, key, (framework, "plain")),
                "ratio_to_pytorch": _ratio(price, key, ("torch", "exact" if mode.startswith("exact") else mode)),
                "flops": case.flops,
                "peak_bytes": case.peak if options.peak == "xla" else isolated_peak(problem, framework, mode, dtype),
                "peak_source": "XLA buffers" if options.peak == "xla" else "fresh process",
                **errors(case, framework, mode, reference, options.draws),
            }
        yield distrust(row)


def distrust(row: measure.Row) -> measure.Row:
    """The row, without its times where ``torch.compile`` computed something else.

    Seen with PyTorch 2.13 on a CPU: at batch 1 the compiled exact step has another penalty than the same code in eager
    mode or with the backend ``aot_eager``.
    """
    limit = TOLERANCE if row["dtype"] == "float32" else LOW_PRECISION_TOLERANCE
    error = row["gradient_error"]
    exact = row["framework"] == "torch.compile" and row["mode"] != "finite_difference"
    if not exact or error is None or error <= limit:
        return row
    untimed = dict.fromkeys(("seconds", "seconds_spread", "ratio_to_plain", "ratio_to_pytorch"))
    return row | untimed | {"status": f"wrong: gradient error {error:.1e}"}


def errors(case: Case, framework: str, mode: str, reference: Gradients, draws: int) -> measure.Row:
    """Relative L2 errors of the gradient against the other framework's exact one (same mode for plain and cmp).

    ``penalty_gradient_error`` is the same for the penalty's part alone: what is left when the plain gradient is taken
    away.  ``mean_gradient_error``: of the mean over ``--draws`` steps, for the modes that change from step to step.
    """
    other = "torch" if framework == "jax" else "jax"
    truth = reference[other, mode if mode in ("plain", "cmp") else "exact"]
    gradient = case.gradient(0)
    row = {"gradient_error": _distance(gradient, truth)}
    if mode not in ("plain", "cmp"):
        part = jax.tree.map(np.subtract, truth, reference[other, "plain"])
        row["penalty_gradient_error"] = _norm(jax.tree.map(np.subtract, gradient, truth)) / _norm(part)
    if mode in problems.CHANGING:
        total = gradient
        for index in range(1, draws):
            total = jax.tree.map(np.add, total, case.gradient(index))
        row["mean_gradient_error"] = _distance(jax.tree.map(lambda x: x / draws, total), truth)
        row["draws"] = draws
    return row


def isolated_peak(problem: problems.Problem, framework: str, mode: str, dtype: str) -> int | None:
    """Peak memory of one step in a fresh process, without its arguments."""
    case = {"framework": framework, "mode": mode, "dtype": dtype, "grid": problem.grid}
    case |= {"batch": problem.batch, "classes": problem.classes}
    return measure.run_isolated("benchmarks.fisher_penalty", [f"--isolated={json.dumps(case)}"])["peak_bytes"]


def table_1(options: flags.FlagValues) -> Iterator[measure.Row]:
    """Every size; the machine does one at a time."""
    for grid in options.grids:
        for batch in map(int, options.tiny_batches if grid == "tiny" else options.batches):
            for classes in map(int, options.classes):
                problem = problems.make(grid, batch, classes)
                say(f"grid {grid}, batch {batch}, K={classes}: comparing the frameworks")
                reference = check_agreement(problem)
                for dtype in options.dtype:
                    say(f"grid {grid}, batch {batch}, K={classes}: timing in {dtype}")
                    yield from rows_of(problem, dtype, reference, options)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _ratio(price: dict[Key, float], key: Key, base: Key) -> float | None:
    return price[key] / price[base] if base in price else None


def _norm(tree: Params) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def _distance(a: Params, b: Params) -> float:
    return _norm(jax.tree.map(np.subtract, a, b)) / _norm(b)


def run(options: flags.FlagValues) -> list[measure.Row]:
    """Check the flags, measure, print, write.

    Raises:
        UsageError: for a flag with an unusable value.
        InputError: when the frameworks disagree.
    """
    if options.isolated:
        print(json.dumps({"peak_bytes": problems.peak_bytes(**json.loads(options.isolated))}))
        return []
    tables = {
        "1": (table_1, COLUMNS),
        "2": (whole_step.table_2, whole_step.COLUMNS_2),
        "3": (whole_step.table_3, whole_step.COLUMNS_3),
    }
    _known("tables", options.tables, tables)
    _known("modes", options.modes, problems.MODES)
    _known("compile", options.compile, torch_fisher.MODES)
    _known("grids", [grid for grid in options.grids if not grid.isdigit()], ("tiny", "whole numbers"))
    _known("encoders", options.encoders, presets.PRESETS)
    # A CPU silently computes everything in float32.
    _known("dtype", options.dtype, ("float32",) if jax.default_backend() == "cpu" else problems.PRECISIONS)
    for name in ("batches", "tiny_batches", "classes"):
        if not all(value.isdigit() and int(value) > 0 for value in getattr(options, name)):
            raise UsageError(f"--{name}={','.join(getattr(options, name))} must be positive whole numbers.")
    measure.warn_if_busy()
    rows, texts = [], []
    for name in options.tables:
        make, columns = tables[name]
        found = list(make(options))
        rows += found
        texts.append("\n".join(measure.table(found, columns)))
        print(f"\nTable {name}: {found[0]['device']}\n\n{texts[-1]}\n", flush=True)
    if options.markdown:
        files.write_atomically(pathlib.Path(options.markdown), "\n\n".join(texts) + "\n")
    if options.json:
        measure.write_json(options.json, rows)
        print(f"The rows are in {options.json}")
    return rows


def _known(flag: str, values: Sequence[str], known: Collection[str]) -> None:
    for value in values:
        if value not in known:
            raise UsageError(f"--{flag} has {value!r}; here it takes {', '.join(known)}.")


if __name__ == "__main__":
    measure.main(define_flags, run)
