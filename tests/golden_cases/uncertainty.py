"""Likelihoods, uncertainty maps and their scores, ranks: which golden method is which of our functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calsegx.metrics import ranks, statistics
from calsegx.uncertainty import likelihood, sampling, scores
from tests.golden_cases import Case, Close, maps


def with_gradients(function: Callable, parity: str = "", **arguments: Any) -> dict[str, Any]:
    """``value``, the mean over samples, and its derivatives ``d_NAME`` with respect to the named arguments."""
    with jax.enable_x64():
        arguments = {name: jnp.asarray(array) for name, array in arguments.items()}
        differentiated = jax.value_and_grad(lambda given: jnp.mean(function(**given)))
        value, gradients = jax.tree.map(np.asarray, jax.jit(differentiated)(arguments))
    found = {"value": value} | {f"d_{name}": gradient for name, gradient in gradients.items()}
    return {role: Close(array, parity=parity) for role, array in found.items()}


@maps("likelihood", r"OOD seed Eq\.4, mean over pixels", r"OOD seed Eq\.5: Eq\.4 \+ lambda")
def gaussian(case: Case) -> dict[str, Any]:
    def loss(mu, sigma):
        if "lam" not in case.hparams:
            return likelihood.gaussian_nll(mu, sigma, case["y"])
        weight = case.hparams["lam"]
        return likelihood.penalised_gaussian_nll(mu, sigma, case["y"], case["yhat"], weight=weight)

    return with_gradients(loss, mu=case["mu"], sigma=case["sigma"])


@maps("likelihood", "generalised Gaussian NLL with constants", "beta fixed at")
def generalised_gaussian(case: Case) -> dict[str, Any]:
    def loss(mu, alpha, beta):
        return likelihood.generalised_gaussian_nll(mu, alpha, beta, case["y"])

    beta = np.full_like(case["beta"], case.hparams["beta"]) if "beta" in case.hparams else case["beta"]
    found = with_gradients(loss, mu=case["mu"], alpha=case["alpha"], beta=beta)
    return found | {"scipy_nll": found["value"]}


@maps("likelihood", r"Eq\.8 uncertainty")
def generalised_gaussian_variance(case: Case) -> dict[str, Any]:
    with jax.enable_x64():
        alpha, beta = jnp.asarray(case["alpha"]), jnp.asarray(case["beta"])
        variance = np.asarray(likelihood.generalised_gaussian_variance(alpha, beta))
        of_gaussian = np.asarray(likelihood.generalised_gaussian_variance(alpha, 2.0))
    return {"var": variance, "scipy_var": variance, "var_beta2": of_gaussian}


@maps("likelihood", "BayesCap GenGaussLoss AS CODED", "BayesCap TempCombLoss")
def bayescap(case: Case) -> dict[str, Any]:
    hparams = case.hparams
    floors = {"alpha_floor": hparams["alpha_eps"], "beta_floor": hparams["beta_eps"]}

    def loss(mu, one_over_alpha, beta):
        if "T1" in hparams:
            weights = {"identity_weight": hparams["T1"], "nll_weight": hparams["T2"]}
            return likelihood.bayescap(mu, one_over_alpha, beta, case["y"], case["yhat"], **weights, **floors)
        bounds = {"smallest": hparams["resi_min"], "largest": hparams["resi_max"]}
        return likelihood.bayescap_nll(mu, one_over_alpha, beta, case["y"], **bounds, **floors)

    arguments = {"mu": case["mu"], "one_over_alpha": 1 / case["alpha"], "beta": case["beta"]}
    return with_gradients(loss, parity="bayescap", **arguments)


@maps("likelihood", "BayesCap variance as coded")
def bayescap_variance(case: Case) -> dict[str, Any]:
    with jax.enable_x64():
        variance = likelihood.bayescap_variance(jnp.asarray(1 / case["alpha"]), jnp.asarray(case["beta"]))
        return {"var": Close(np.asarray(variance), parity="bayescap_variance")}


@maps("likelihood", "TTDAp/TTDAc/dropout uncertainty")
def passes(case: Case) -> dict[str, Any]:
    assert case.hparams["ddof"] == 1, case.hparams
    found = sampling.statistics(case["probs"][..., None])
    return {
        "var": found.variance,
        "mean": found.mean[..., 0],
        "entropy": found.entropy,
        "mutual_information": found.mutual_information,
    }


@maps("scores", "Otsu threshold")
def otsu(case: Case) -> dict[str, Any]:
    found = {}
    for role in case.outputs:
        bins = int(role.rpartition("_b")[2])
        function = scores.otsu_threshold if role.startswith("threshold") else scores.uncertain_area
        found[role] = function(case["image"], bins=bins)
    return found


@maps("scores", "per-image uncertain-area score")
def area_score(case: Case) -> dict[str, Any]:
    area = [scores.uncertain_area(image) for image in case["U"]]
    thresholds = [scores.otsu_threshold(image) for image in case["U"]]
    return {"thresholds": thresholds, "area": area, "mse": scores.quality_error(area, case.hparams["errors"])}


@maps("ranks", r"mean rank over \d+ dataset-metric columns")
def mean_rank(case: Case) -> dict[str, Any]:
    higher = case.hparams["higher_better"]
    found = {f"mean_rank_{ties}": ranks.mean_rank(case["table"], higher, ties=ties).value for ties in ranks.TIES}
    # Printed with two decimals, halves rounded up.
    return found | {"published": np.floor(found["mean_rank_min"] * 100 + 0.5) / 100}


@maps("ranks", "mean-case-rank")
def case_ranks(case: Case) -> dict[str, Any]:
    friedman = ranks.friedman(case["scores"], True)
    paired = statistics.paired_t_test(case["a"], case["b"])
    line, probit = (statistics.pearson(case["a"], case["b"], probit=probit) for probit in (False, True))
    return {
        "case_ranks": ranks.ranks(case["scores"], True),
        "mean_case_rank": ranks.mean_case_rank(case["scores"][:, :, None], True).value,
        "friedman_stat": friedman.statistic,
        "friedman_p": friedman.p,
        "t": paired.statistic,
        "t_p": paired.p,
        "r": line.r,
        "r_p": line.p,
        "slope_probit": (probit.slope, probit.intercept),
    }
