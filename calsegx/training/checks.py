"""What is tried out before a run starts."""

import dataclasses
from collections.abc import Callable

from calsegx import configs
from calsegx.interfaces import Backbone, Batch, InputError
from calsegx.losses import fisher
from calsegx.training import step as train_step

LARGEST_PERTURBED_ERROR = 0.1  # of the gradient of the penalty, in the Fisher mode ``perturbed``


def check_second_derivative(
    config: configs.TrainConfig,
    backbone: Backbone,
    probe: Callable[[], Batch],
    objective: train_step.Objective,
) -> str:
    """Without a second derivative the penalty would silently be wrong; find out on two slices.

    ``probe`` gives them.  The mode ``perturbed`` is compared with the exact one there, at the full weight.

    Returns:
        What to tell the user where the mode needs no such check, or nothing.
    """
    if not configs.METHODS[config.method].fisher or config.fisher.weight == 0:
        return ""
    if config.fisher.mode == "finite_difference":
        return " The Fisher mode 'finite_difference' needs no second derivative, so none is checked."
    # With the data's labels: one drawn from the model might flip between the steps of the difference.
    config = dataclasses.replace(config, fisher=dataclasses.replace(config.fisher, labels="empirical"))
    loss_fn = train_step.make_loss_fn(backbone.decode, objective, config)
    batch = probe()
    arguments = backbone.trainable, batch.features, backbone.frozen, batch.labels, batch.prompts
    try:
        fisher.second_derivative_check(loss_fn, *arguments)
    except ValueError as error:
        raise InputError(
            f"The Fisher penalty does not work with this backbone and loss: {error} Choose another "
            "--config.loss or --config.model.backbone, --config.fisher.mode=finite_difference, or a --config.method "
            "without the Fisher penalty."
        ) from error
    if config.fisher.mode == "perturbed":
        options = {"reading": config.fisher.reading, "normalisation": config.fisher.normalisation}
        error = fisher.perturbed_error(
            loss_fn, *arguments, weight=config.fisher.weight, batch=config.batch_size, **options
        )
        if not error <= LARGEST_PERTURBED_ERROR:
            raise InputError(
                "With this backbone, loss and weight the penalty's gradient by --config.fisher.mode=perturbed is wrong "
                f"by {error:.2g} of the exact one on two training slices, more than {LARGEST_PERTURBED_ERROR}; use "
                "--config.fisher.mode=exact, or a lower --config.fisher.weight."
            )
    return ""
