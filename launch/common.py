"""What every launch script does: define and parse flags, run, turn an InputError into one sentence and an exit code."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from calsegx import configs, memory
from calsegx.interfaces import InputError, UsageError


def run(main: Callable[[], None], define_flags: Callable[[], None]) -> None:
    """Define flags, parse the command line, call ``main``.

    Exit codes: 0 done, 1 failed, 2 a flag is wrong, 3 data is invalid, 130 interrupted by Ctrl-C.
    """

    def guarded(argv: Sequence[str]) -> int:
        del argv
        try:
            main()
        except InputError as error:
            return _complain(error)
        except OSError as error:  # a full disk, a file where a folder is expected, no permission
            return _complain(
                InputError(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and the space.")
            )
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
    app.run(guarded, flags_parser=_parse)


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
