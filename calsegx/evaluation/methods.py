"""The methods of an evaluation: their order in tables and their names for readers."""

from collections.abc import Iterable

CALIBRATED = "+ts"  # suffix of a method's name: with temperature scaling fitted on source validation cases
SUFFIXES = {  # of calibrators, and for readers
    CALIBRATED: "TS",
    "+lts": "LTS",
    "+image_temperature": "image TS",
    "+vector": "vector scaling",
    "+matrix": "matrix scaling",
    "+platt": "Platt",
    "+dirichlet": "Dirichlet",
}
_CALIBRATORS = {"temperature": CALIBRATED, "local_temperature": "+lts"}
_BASE_NAMES = {
    "prompt_only_disc": "Prompt-only disc",
    "prompt_only_ellipse": "Prompt-only ellipse",
    "vanilla_sam": "Vanilla SAM",
    "sam_ft": "SAM-FT",
    "early_stopping": "SAM-FT, stopped early",
    "sam_fip": "SAM-FT + FIP",
    "sam_cmp": "SAM-FT + CMP",
    "calsam": "CalSAM",
    "crac": "CRaC",
    "medsam": "MedSAM recipe",
    "medsam_whole": "MedSAM recipe, whole model",
    "focal": "Focal",
    "dice_plus_plus": "Dice++",
    "mbls": "MbLS",
    "nacl": "NACL",
    "svls": "SVLS",
    "label_smoothing": "Label smoothing",
    "ecp": "ECP",
}
KNOWN = tuple(_BASE_NAMES)  # without their calibrators
PROMPT_ONLY = ("prompt_only_disc", "prompt_only_ellipse")
VANILLA = "vanilla_sam"
UNTRAINED = (*PROMPT_ONLY, VANILLA)
BASELINE, EARLY = "sam_ft", "early_stopping"
# What each method adds to SAM-FT, in the words of a verdict.
ADDITIONS = {"sam_fip": "FIP", "sam_cmp": "CMP", "calsam": "FIP + CMP"}


def order(names: Iterable[str]) -> list[str]:
    """The names in display order, each once; unknown ones follow in the order in which they came."""
    given = list(dict.fromkeys(names))
    known = [name + suffix for name in _BASE_NAMES for suffix in ("", *SUFFIXES)]
    return [name for name in known if name in given] + [name for name in given if name not in known]


def is_ours(name: str) -> bool:
    """Whether the method has FIP or CMP, whatever its loss and calibration: what is not is a baseline."""
    return base(name).partition(":")[0] in ADDITIONS


def base(name: str) -> str:
    """The method without its calibrator."""
    return name.removesuffix(_suffix(name))


def calibrated(name: str) -> bool:
    """Whether the method is another one with a calibrator."""
    return bool(_suffix(name))


def suffix_of(calibrator: str) -> str:
    """What a method's name ends with when it has been calibrated by the registered ``calibrator``."""
    return _CALIBRATORS.get(calibrator, f"+{calibrator}")


def _suffix(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def display(name: str) -> str:
    """The name for readers, with the loss where a run has another than its method's; an unknown one is as it is."""
    suffix = f" + {SUFFIXES[_suffix(name)]}" if calibrated(name) else ""
    method, colon, loss = base(name).partition(":")
    return _BASE_NAMES.get(method, method) + (f" ({loss})" if colon else "") + suffix
