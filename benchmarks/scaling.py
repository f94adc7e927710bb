"""What a training step costs on more and more devices, at a fixed number of slices per device, and what they exchange.

python -m benchmarks.scaling --json=docs/scaling.json --figure=docs/scaling.png
python -m benchmarks.scaling --platform=gpu --devices=1,2,4,8 --per_device=16 --vit_devices=8

On a CPU the devices are emulated and share its cores: their times say how the program grows, not how fast devices are.
The bytes are read from the compiled program and hold for any device.  Every number of devices is a fresh process.
Neither grain nor nibabel is imported.
"""

import dataclasses
import io
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import measure, train_step
from calsegx import configs, files, losses, sharding
from calsegx.interfaces import Backbone, UsageError
from calsegx.losses import expression
from calsegx.models import sam
from calsegx.models.sam import backbone, presets
from calsegx.training import cost
from calsegx.training import state as train_state
from calsegx.training import step as step_module

COLUMNS = {"decoder": "", "devices": "d", "batch": "d", "seconds": ".4f", "seconds_per_slice": ".4f", "gflop": ".2f"}
COLUMNS |= {"temporary_mb": ".1f", "exchanges": "d", "exchanged_mb": ".3f", "sent_mb": ".3f", "gradients_mb": ".3f"}
MODEL = {"network": "", "gb_per_second": "g", "microseconds": "g", "devices": "d", "milliseconds": ".2f"}
# Bandwidth per direction of one device's link and latency of one message: assumptions, not measurements.
NETWORKS = {"NVLink": (450.0, 3.0), "InfiniBand 400 Gb/s": (50.0, 5.0), "Ethernet 10 Gb/s": (1.25, 30.0)}


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    flags.DEFINE_string("json", "", "File to write the rows to.", flag_values=values)
    flags.DEFINE_string("figure", "", "PNG to draw.", flag_values=values)
    flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices.", flag_values=values)
    flags.DEFINE_integer("per_device", 2, "Slices per device.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 15, "Timed steps.", lower_bound=3, flag_values=values)
    flags.DEFINE_integer("vit_devices", 4, "Devices of the row of SAM's own decoder.", flag_values=values)
    flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "cpu: emulated devices.", flag_values=values)
    flags.DEFINE_string("only", "", "Measure one case and print it as JSON: tiny or vit.", flag_values=values)


def vit_decoder(folder: Path) -> Backbone:
    """SAM's decoder at 1024 pixels, as all of Meta's sizes have it, behind an encoder of one narrow block."""
    config = dataclasses.replace(presets.VIT_B, depth=1, embed_dim=32, num_heads=2, global_attn_indexes=())
    sam.save(folder / "vit", config, sam.init(config, jax.random.key(0)), "Random numbers. Not a medical device.")
    return backbone.load_backbone(folder / "vit", 1)


def row_of(decoder: str, devices: int, per_device: int, rounds: int) -> measure.Row:
    """Measure CalSAM's step; SAM's own decoder is only compiled on a CPU."""
    if len(jax.devices()) < devices:
        raise UsageError(f"--devices={devices} is more than the {len(jax.devices())} devices of this machine.")
    mesh = sharding.device_mesh(jax.devices()[:devices])
    with tempfile.TemporaryDirectory() as folder:
        network = vit_decoder(Path(folder)) if decoder == "vit" else backbone.load_backbone(None, 1)
    config = configs.TrainConfig(batch_size=per_device * devices)
    objective = step_module.Objective(expression.parse("sam"), losses.get("bce"), losses.get("cmp"))
    found = cost.of_train_step(config, network, objective, mesh)
    exchanged = [size for sizes in found.collectives.values() for size in sizes] if devices > 1 else []
    row: measure.Row = {
        "decoder": decoder,
        "devices": devices,
        "batch": config.batch_size,
        "seconds": None,
        "seconds_per_slice": None,
        "gflop": found.flops / 1e9,
        "temporary_mb": found.temporary / 1e6,
        "collectives": sorted(found.collectives) if devices > 1 else [],
        "exchanges": len(exchanged),
        "exchanged_mb": sum(exchanged) / 1e6,
        "sent_mb": ring_bytes(sum(exchanged), devices) / 1e6,
        "gradients_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(network.trainable)) / 1e6,
        **measure.machine(),
    }
    if decoder == "tiny" or jax.default_backend() != "cpu":
        optimizer = train_state.make_optimizer(config)
        step = step_module.make_train_step(network.decode, network.frozen, objective, config, optimizer, mesh)
        batch = sharding.shard_batch(mesh, train_step.example(network, config.batch_size, 1))
        steps = train_step.Steps(step, train_state.init_state(network.trainable, optimizer, mesh), batch)
        seconds = measure.interleave({"step": steps}, rounds)["step"]
        row["seconds"] = statistics.median(seconds)
        row["seconds_per_slice"] = row["seconds"] / config.batch_size
        row["seconds_spread"] = measure.spread(seconds)
    return row


def ring_bytes(size: float, devices: int) -> float:
    """Bytes that each device sends, and receives, in a ring all-reduce of ``size`` bytes: ``2 (n - 1) / n * size``."""
    return 2 * (devices - 1) / devices * size


def model(size: float, counts: Sequence[int]) -> list[measure.Row]:
    """Milliseconds of a ring all-reduce of ``size`` bytes: ``ring_bytes / bandwidth + 2 (n - 1) * latency``."""
    rows = []
    for network, (gigabytes, latency) in NETWORKS.items():
        for count in counts:
            seconds = ring_bytes(size, count) / (gigabytes * 1e9) + 2 * (count - 1) * latency * 1e-6
            rows.append({"network": network, "gb_per_second": gigabytes, "microseconds": latency, "devices": count,
                         "milliseconds": 1e3 * seconds})  # fmt: skip
    return rows


def draw(path: Path, rows: Sequence[measure.Row]) -> None:
    """Seconds per step, and megabytes each device sends, over the number of devices."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(8, 3.2), layout="constrained")
    time, traffic = picture.subplots(1, 2)
    devices = [row["devices"] for row in rows]
    seconds = [row["seconds"] for row in rows]
    low, high = zip(*(row["seconds_spread"] for row in rows), strict=True)
    time.fill_between(devices, low, high, alpha=0.2, label="quartiles")
    time.plot(devices, seconds, "o-", label="measured")
    cores = rows[0]["cores"]
    if "cores," in rows[0]["device"]:
        work = [seconds[0] * max(1, count / cores) for count in devices]
        time.plot(devices, work, "--", color="grey", label=f"1 device's time x devices / {cores} cores")
    time.set(xlabel="devices", ylabel="time per step in s", ylim=(0, None), xticks=devices)
    time.set_title(f"{rows[0]['batch'] // devices[0]} slices per device, tiny SAM, CalSAM", fontsize=10)
    time.legend(fontsize=8)
    traffic.plot(devices, [row["sent_mb"] for row in rows], "o-", label="sent by each device (ring)")
    traffic.plot(devices, [row["exchanged_mb"] for row in rows], "s--", label="result of the all-reduce")
    traffic.axhline(rows[0]["gradients_mb"], color="grey", linewidth=1, label="all gradients of the decoder")
    traffic.set(xlabel="devices", ylabel="traffic per step in MB", ylim=(0, None), xticks=devices)
    traffic.set_title("read from the compiled program", fontsize=10)
    traffic.legend(fontsize=8)
    content = io.BytesIO()
    picture.savefig(content, format="png", dpi=150)
    files.write_atomically(path, content.getvalue())


def run(options: flags.FlagValues) -> None:
    """Measure, print, write, draw."""
    if options.only:
        print(json.dumps(row_of(options.only, int(options.devices[0]), options.per_device, options.rounds)))
        return
    measure.warn_if_busy()
    tiny = [_isolated("tiny", count, options.per_device, options) for count in map(int, options.devices)]
    vit = _isolated("vit", options.vit_devices, 1 if options.platform == "cpu" else options.per_device, options)
    measure.print_table([*tiny, vit], COLUMNS)
    predicted = model(1e6 * vit["exchanged_mb"], (2, 8, 64, 256))
    print("\nA ring all-reduce of SAM's decoder, predicted for assumed networks:\n")
    measure.print_table(predicted, MODEL)
    if options.json:
        measure.write_json(options.json, [*tiny, vit, *predicted])
        print(f"The rows are in {options.json}")
    if options.figure:
        draw(Path(options.figure), tiny)
        print(f"The figure is {options.figure}")


def _isolated(decoder: str, devices: int, per_device: int, options: Any) -> measure.Row:
    numbers = [f"--devices={devices}", f"--per_device={per_device}", f"--rounds={options.rounds}"]
    emulated = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment = emulated if options.platform == "cpu" else None
    return measure.run_isolated("benchmarks.scaling", [f"--only={decoder}", *numbers], environment)


if __name__ == "__main__":
    measure.main(define_flags, run)
