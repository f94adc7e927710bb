"""What every launch script does: define and parse flags, run, turn an InputError into one sentence and an exit code."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from calsegx import configs, memory
from calsegx.interfaces import InputError, UsageError
from calsegx.training import interruption

LOST = ("Gloo", "NCCL", "CoordinationService", "coordination service")  # words of errors when another process ended


def run(main: Callable[[], None], define_flags: Callable[[], None]) -> None:
    """Define flags, parse the command line, call ``main``.

    Exit codes: 0 done, 1 failed, 2 a flag is wrong, 3 data is invalid, 130 stopped by Ctrl-C, 143 stopped by SIGTERM
    or SIGUSR1.
    """

    def guarded(argv: Sequence[str]) -> int:
        del argv
        code = attempt()
        if code and jax.distributed.is_initialized():  # an orderly end would wait for the other processes
            sys.stdout.flush()
            os._exit(code)
        return code

    def attempt() -> int:
        try:
            _join_processes()
            main()
        except InputError as error:
            return _complain(error)
        except OSError as error:  # a full disk, a file where a folder is expected, no permission
            return _complain(
                InputError(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and the space.")
            )
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1 or not any(word in str(error) for word in LOST):
                raise
            return _complain(
                InputError(
                    f"This process lost the others ({str(error).splitlines()[0]}); read what the first that ended "
                    "said, then start all of them again, with --resume where a step was saved."
                )
            )
        except interruption.Interrupted as stopped:
            print(stopped, file=sys.stderr)
            return stopped.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    try:
        define_flags()
    except UsageError as error:
        sys.exit(_complain(error))
    logging.set_verbosity(logging.WARNING)  # orbax and grain report every step at INFO
    memory.keep_freed_memory()
    _enable_compilation_cache()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until training or encoding takes over, which saves first
        signal.signal(number, _end)
    app.run(guarded, flags_parser=_parse)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise interruption.Interrupted(
        f"Stopped by {name}: what was written by then is whole.", interruption.EXIT_CODES[number]
    )


def define_config() -> None:
    """``--config.*`` flags, one for each field of ``configs.TrainConfig``.

    Raises:
        UsageError: when the command line sets a field that does not exist, naming the nearest.
    """
    known = field_names(configs.TrainConfig())
    for argument in sys.argv[1:]:
        name = argument.lstrip("-").partition("=")[0].removeprefix("no")
        if argument.startswith("-") and name.startswith("config.") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"There is no flag --{name}." + (f" Did you mean --{near[0]}?" if near else " See --helpfull.")
            )
    config_flags.DEFINE_config_dataclass("config", configs.TrainConfig())


def define_folder(name: str, description: str) -> None:
    """A required flag that names a folder to write to."""
    flags.DEFINE_string(name, None, description, required=True)
    flags.register_validator(name, lambda value: value is None or bool(value), "must name a folder")
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # else --help would not list it


def define_processes() -> None:
    """``--distributed`` and, where no cluster tells, ``--coordinator``, ``--num_processes`` and ``--process_id``."""
    flags.DEFINE_bool("distributed", False, "This is one of several processes; who they are is asked of Slurm or MPI.")
    flags.DEFINE_string("coordinator", "", "host:port of the first of several processes, given to each of them.")
    flags.DEFINE_integer("num_processes", 0, "How many processes there are, with --coordinator.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0, with --coordinator.", lower_bound=-1)


def _join_processes() -> None:
    """Make this one of several processes, where the flags say so; before anything asks for a device."""
    if "distributed" not in flags.FLAGS:
        return
    arguments = flags.FLAGS
    explicit = bool(arguments.coordinator)
    if explicit != (arguments.num_processes > 0) or explicit != (arguments.process_id >= 0):
        raise UsageError("--coordinator, --num_processes and --process_id belong together; give all three or none.")
    if explicit and not arguments.process_id < arguments.num_processes:
        raise UsageError(
            f"--process_id={arguments.process_id} must be below --num_processes={arguments.num_processes}."
        )
    if not explicit and not arguments.distributed:
        return
    known = (arguments.coordinator, arguments.num_processes, arguments.process_id) if explicit else ()
    try:
        jax.distributed.initialize(*known)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The processes did not find each other ({str(error).splitlines()[0]}); check --coordinator, or that the "
            "job was started by srun or mpirun with one task per process."
        ) from error


def field_names(config: object, prefix: str = "config") -> list[str]:
    """The flags of a configuration, without the dashes."""
    names = []
    for name, value in vars(config).items():
        nested = field_names(value, f"{prefix}.{name}") if hasattr(value, "__dict__") else [f"{prefix}.{name}"]
        names.extend(nested)
    return names


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            raise UsageError(f"{rest[1]!r} is not a flag; flags look like --name=value (see --help).")
    except (flags.Error, UsageError) as error:
        sys.exit(_complain(UsageError(str(error))))
    return rest


def _complain(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _enable_compilation_cache() -> None:
    """Keep compiled functions between runs, in ``JAX_COMPILATION_CACHE_DIR`` or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "calsegx" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
