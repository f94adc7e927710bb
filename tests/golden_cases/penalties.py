"""CRaC's augmented Lagrangian and the Fisher penalty: which golden method is which of our options."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calsegx.losses import augmented_lagrangian, cross_entropy, fisher, neighbourhood, overlap
from tests.golden_cases import Case, Close, Left, maps
from tests.losses.fisher_toy import decode

BACKGROUND = "border='background'"  # what the published patches see outside the image
ROUNDED_MASK = "CRaC's float32 mask depends on rounding errors: 8 to 13 % of its outer voxels are taken for inner"


def rows(vector: Any, classes: int) -> jnp.ndarray:
    """Golden vectors are [outer classes, inner classes], ours [[inner], [outer]]."""
    return jnp.asarray(np.broadcast_to(np.asarray(vector, float), 2 * classes).reshape(2, classes)[::-1])


@maps("lagrangian", r"penalty P\(h,rho,lambda\)")
def penalty_on_a_grid(case: Case) -> dict[str, Any]:
    multipliers, rho, h = (np.asarray(case.hparams[name]) for name in ("lambdas", "rhos", "h"))
    grid = (h[None, :], np.repeat(multipliers, len(rho))[:, None], np.tile(rho, len(multipliers))[:, None])
    functions = {"value": augmented_lagrangian.penalty, "deriv": augmented_lagrangian.penalty_derivative}
    with jax.enable_x64():
        arrays = [jnp.asarray(array) for array in grid]
        return {role: np.asarray(f(*arrays, function=case.hparams["penalty"])) for role, f in functions.items()}


@maps(
    "lagrangian",
    "CRaC penalty term",
    "CRaC at initial multipliers",
    "as crac_get_exact",
    r"CRaC exact mask (?P<penalty>\w+) margin (?P<margin>[\d.]+)",
)
def crac(case: Case, penalty: str = "phr", margin: float = 5) -> dict[str, Any]:
    options = {
        "function": case.hparams.get("penalty", penalty),
        "margin": case.hparams.get("margin", margin),
        "border": "background",
    }

    def everything(logits, labels, state):
        def penalty(logits):
            return jnp.mean(augmented_lagrangian.crac(logits, labels, state, **options))

        violation = augmented_lagrangian.sums(logits, labels, state, **options).violation
        mask = neighbourhood.outer_mask(labels, border="background")
        return jax.value_and_grad(penalty)(logits), jnp.sum(violation) / logits.size, mask

    with jax.enable_x64():
        multipliers, rho = (rows(case.hparams[name], case.logits.shape[-1]) for name in ("lambd", "rho"))
        state = augmented_lagrangian.State(multipliers, rho, jnp.zeros_like(rho), jnp.asarray(0))
        outcome = jax.jit(everything)(jnp.asarray(case.logits), jnp.asarray(case.labels), state)
        (total, gradient), constraint, mask = jax.tree.map(np.asarray, outcome)
    found = {
        "penalty": total,
        "value": total,
        "grad": np.moveaxis(gradient, -1, 1),
        "constraint_mean": constraint,
        "outer_mask": mask,
    }
    return {role: Close(array, parity=BACKGROUND) for role, array in found.items()}


@maps("lagrangian", "CRaC unmodified, float32")
def crac_of_rounding_errors(case: Case) -> dict[str, Any]:
    return dict.fromkeys(case.outputs, Left(ROUNDED_MASK))


@maps("lagrangian", "multiplier and rho updates")
def sequence(case: Case) -> dict[str, Any]:
    hparams, classes = case.hparams, case.logits.shape[-1]
    adaptive = case.outputs["lambd"].shape[1] > 1  # else one multiplier for all classes and regions, one margin
    options = {"function": hparams["penalty"], "margin": hparams["margin"], "border": "background"}
    if not adaptive:
        options["outer_margin"] = hparams["margin"]
    updates = {
        "average": "voxels" if adaptive else "all",
        "rho_range": (hparams["rho_min"], hparams["rho_max"]),
        "growth": hparams["gamma"],
        "improvement": hparams["tao"],
        "rho_step": hparams["rho_step"],
    }

    def epoch(state: augmented_lagrangian.State, scale: jnp.ndarray, logits: jnp.ndarray, labels: jnp.ndarray):
        batches = ((scale * logits, labels), (scale * logits[:, ::-1], labels[:, ::-1]))
        sums = augmented_lagrangian.merge(*(augmented_lagrangian.sums(*batch, state, **options) for batch in batches))
        return augmented_lagrangian.update(state, sums, **updates)

    history = []
    with jax.enable_x64():
        state = augmented_lagrangian.init(classes, rho=hparams["rho_min"])
        state, logits, labels = jax.tree.map(jnp.asarray, (state, case.logits, case.labels))
        step = jax.jit(epoch)
        for scale in hparams["seq_scale"]:
            state = step(state, scale, logits, labels)
            history.append(jax.tree.map(np.asarray, state))
    recorded = {"lambd": "multipliers", "rho": "rho", "constraint": "violation"}
    found = {role: np.stack([getattr(state, name) for state in history]) for role, name in recorded.items()}
    columns = 2 * classes if adaptive else 1
    ours = {role: array[:, ::-1].reshape(len(array), -1)[:, :columns] for role, array in found.items()}
    return {role: Close(array, parity=BACKGROUND) for role, array in ours.items()}


@maps("fisher", "CalSAM FIP", "as above with the loss SUMMED over voxels")
def fisher_penalty(case: Case) -> dict[str, Any]:
    names = {"batch_mean_loss": "batch_mean"}
    reading = names.get(case.hparams["reading"], case.hparams["reading"])
    loss = {
        "bce": cross_entropy.ce,
        "dice": overlap.dice,
        "bce_sum": lambda logits, labels: cross_entropy.ce(logits, labels) * labels[0].size,
    }[case.hparams["loss"]]

    def loss_fn(params, z, labels):
        return loss(decode(params, z), labels)

    def everything(params, z, labels):
        def penalty(params):
            value, (task, _) = fisher.penalty(loss_fn, params, z, labels, reading=reading, normalisation="raw")
            return value, jnp.mean(task)

        whole = {"batch_mean": jnp.mean}.get(reading, jnp.sum)  # the gradient of the batch's mean loss, or of each
        gradient = jax.grad(lambda z: whole(loss_fn(params, z, labels)))(z)
        return jax.value_and_grad(penalty, has_aux=True)(params), gradient

    with jax.enable_x64():
        params = {name: jnp.asarray(case[name]) for name in ("W1", "b1", "W2", "b2")}
        features = jnp.asarray(np.moveaxis(case["z"], 1, -1))
        outcome = jax.jit(everything)(params, features, jnp.asarray(case.labels))
        ((value, task), gradients), g_z = jax.tree.map(np.asarray, outcome)
    found = {"penalty": value, "loss": task, "g_z": np.moveaxis(g_z, -1, 1)}
    return found | {f"d_{name}": gradient for name, gradient in gradients.items()}
