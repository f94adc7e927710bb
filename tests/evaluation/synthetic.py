"""Synthetic rows of an evaluation, with known effects."""

from collections.abc import Mapping, Sequence

import numpy as np

from calsegx.evaluation import evaluate

METHODS = (
    *("prompt_only_disc", "vanilla_sam", "sam_ft", "sam_ft+ts", "sam_fip", "sam_fip+ts"),
    *("sam_cmp", "sam_cmp+ts", "calsam", "calsam+ts"),
)
# Added to (DSC, ECE) of 0.70 and 0.10, on the source and on the target.
EFFECTS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "prompt_only_disc": ((-0.10, 0.02), (-0.08, 0.02)),
    "vanilla_sam": ((-0.20, -0.05), (-0.25, -0.03)),
    "sam_ft": ((0.08, 0.0), (-0.06, 0.09)),
    "sam_ft+ts": ((0.08, -0.06), (-0.06, -0.02)),
    "sam_fip": ((0.04, -0.04), (0.0, -0.01)),
    "sam_fip+ts": ((0.04, -0.06), (0.0, -0.05)),
    "sam_cmp": ((0.08, 0.0), (-0.06, 0.09)),
    "sam_cmp+ts": ((0.08, -0.06), (-0.06, -0.02)),
    "calsam": ((0.04, -0.04), (0.0, -0.01)),
    "calsam+ts": ((0.04, -0.06), (0.0, -0.05)),
}
# Of the case's ECE.
FACTORS = {"ECE": 1.0, "Brier": 0.8, "NLL": 2.0, "MCE": 1.4, "CECE": 0.6, "TACE": 0.5}
UNTRAINED = ("prompt_only_disc", "vanilla_sam")


def rows(
    methods: Sequence[str] = METHODS,
    domains: Sequence[str] = ("A", "B"),
    seeds: Sequence[int] = (42, 2024),
    effects: Mapping[str, tuple] = EFFECTS,
    cases: int = 10,
    class_names: Sequence[str] = ("tumour",),
    noise: float = 0.02,
) -> list[evaluate.Row]:
    """Rows whose case effects are shared by all methods, so that paired differences are the effects plus noise."""
    difficulty = np.random.default_rng(0).normal(0, 0.08, cases)
    found = []
    for method in methods:
        # The same stream with and without temperature scaling, which leaves labels as they are.
        rng = np.random.default_rng(METHODS.index(method.removesuffix("+ts")))
        for index, domain in enumerate(domains):
            dice, ece = effects[method][index]
            for seed in seeds[:1] if method in UNTRAINED else seeds:
                for case in range(cases):
                    key = (method, seed, f"case_{case:02d}_{domain}", f"subject_{case:02d}", domain, "test")
                    score = np.clip(0.7 + dice + difficulty[case] + rng.normal(0, noise), 0, 1)
                    error = np.clip(0.1 + ece - difficulty[case] / 4 + rng.normal(0, noise / 4), 0, 1)
                    for name in (*class_names, evaluate.ALL):
                        for metric in evaluate.OF_MASKS:
                            value = score if evaluate.higher_is_better(metric) else 20 - 15 * score
                            found.append(evaluate.Row(*key, name, metric, evaluate.VOLUME, float(value), True))
                    for region, scale in (("p>0.01", 1.0), ("dilated", 1.2), ("all", 0.1), ("gt_fg", 1.5)):
                        for metric, factor in FACTORS.items():
                            value = float(error * scale * factor)
                            found.append(evaluate.Row(*key, evaluate.ALL, metric, region, value, True))
    return found
