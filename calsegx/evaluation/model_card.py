"""The model card of a bundle, in Hugging Face's form, and the results it shows: of one model, by domain and region."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from calsegx import configs
from calsegx.evaluation import evaluate, methods, tables

# Of Hugging Face's identifiers; any other licence is "other", with its name.
_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
)
_NOT_EVALUATED = "Not evaluated: this bundle was exported without an evaluation. Nothing is known of its accuracy."

_CARD = """---
{head}
---

# {classes} by a promptable segmentation decoder (calsegx)

**Not a medical device.** For research only; not for diagnosis or treatment.

{network} Written by calsegx {version}; predict with

    python -m launch.predict --model=BUNDLE --data=DATASET --prompts=clicks.tsv --output=predictions

## Intended use

Research on the segmentation of {classes} in images with the channels {channels}, prompted by `{protocol}`{placed}, and
on how well the probabilities hold on images of other scanners, hospitals and populations.

## Out-of-scope use

Diagnosis, treatment, or any decision about a person; use without somebody who checks every mask; images of other kinds,
other channels or other preparation (`preprocessing.json`), and other classes than {classes}.

## Training domains

{domain} of the dataset {dataset}: {cases}. Method: {method}, {steps} steps, seed {seed}. {data_licence}

## Results

{results}

## Calibration

{calibration}

## Limits

- Its probabilities were fitted on the training domain: on images of another domain check their calibration before
  relying on it.
- Where prompts are placed on the reference labels, the results are a benchmark: a user's clicks are not as good.
- Volumes are segmented slice by slice; slices without a prompt are background by protocol.

## Licence and origin

Licence: {license}. Derived from: {derived_from}. {data_licence}
"""


def results(rows: Iterable[evaluate.Row], method: str, seed: int) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the cases of one model, and of it with temperature scaling.

    Per domain and column of ``tables.COLUMNS``, over all classes together; None where nothing can be said.  How many of
    the cases are undefined stands beside them.
    """
    groups: dict[tuple[str, str, str, str], list[evaluate.Row]] = {}
    for row in rows:
        if row.class_name == evaluate.ALL and row.seed == seed and methods.base(row.method) == method:
            groups.setdefault((row.domain, row.method, row.metric, row.region), []).append(row)
    shown = {(column.metric, column.region) for column in tables.COLUMNS}
    found = []
    for (domain, name, metric, region), members in groups.items():
        if (metric, region) not in shown:
            continue
        known = [row.value for row in members if not math.isnan(row.value)]
        found.append(
            {
                "domain": domain,
                "temperature_scaled": name != method,
                "metric": metric,
                "region": region,
                "mean": float(np.mean(known)) if known else None,
                "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
                "cases": len(members),
                "undefined": sum(not row.defined for row in members),
            }
        )
    return found


def write(manifest: Mapping[str, Any], record: Mapping[str, Any], calibrator: Mapping[str, Any] | None) -> str:
    """The card as Markdown with a YAML head.

    Args:
        manifest: ``bundle.json``.
        record: ``model.json`` of the bundle.
        calibrator: the calibrator's params, if there is one.
    """
    training = manifest["training"]
    data_licence = manifest["data_licence"]
    counts = ", ".join(f"{count} {split}" for split, count in training["cases"].items())
    return _CARD.format(
        head=_head(manifest, training["dataset"]),
        classes=", ".join(record["class_names"]),
        channels=", ".join(dict.fromkeys(record["channels"])),
        protocol=record["config"]["protocol"],
        placed=f" ({training['prompts']})",
        network=_network(manifest["encoder"], record),
        version=record["calsegx"],
        domain=f"{training['domain_kind'].capitalize()} {training['source']}"
        if training["source"]
        else f"All {training['domain_kind']}s",
        **{name: training[name] for name in ("dataset", "method", "steps", "seed")},
        cases=f"{counts} cases of {training['subjects']} subjects",
        data_licence=f"Licence of the training data: {data_licence}."
        if data_licence
        else "The licence of the training data is not stated.",
        results=_results(manifest["evaluation"], training["source"]),
        calibration=_calibration(manifest["calibrator"], calibrator),
        license=manifest["license"],
        derived_from=manifest["derived_from"],
    )


def _network(encoder: str, record: Mapping[str, Any]) -> str:
    """What was trained of the backbone, and whether the rest comes along."""
    trained, rest = "A mask decoder on the features of a frozen Segment Anything Model.", "The encoder"
    if record["config"]["model"]["backbone"] in configs.WHOLE:
        trained = "A Segment Anything Model whose image encoder and mask decoder were trained."
        rest = "The SAM that the training started from, whose prompt encoder it keeps,"
    if encoder == "include":
        return f"{trained} {rest} is part of the bundle."
    return f"{trained} {rest} is not part of the bundle: the weights with the fingerprint `{record['backbone']}`."


def _head(manifest: Mapping[str, Any], dataset: str) -> str:
    """YAML; a JSON string is one of YAML's."""
    known = manifest["license"].lower() in _LICENSES
    license_lines = [f"license: {manifest['license'].lower()}"]
    if not known:
        license_lines = ["license: other", f"license_name: {json.dumps(manifest['license'])}", "license_link: LICENSE"]
    measured = dict.fromkeys(entry["metric"] for entry in (manifest["evaluation"] or {"results": ()})["results"])
    lists = {
        "tags": ["medical", "image-segmentation", "segment-anything", "calibration", "jax"],
        "datasets": [dataset],
        "metrics": list(measured),
    }
    lines = [*license_lines, "library_name: calsegx", "pipeline_tag: image-segmentation"]
    return "\n".join([*lines, *(f"{name}: {json.dumps(values)}" for name, values in lists.items())])


def _results(evaluation: Mapping[str, Any] | None, source: str) -> str:
    if evaluation is None:
        return _NOT_EVALUATED
    columns = tables.COLUMNS
    found = {(e["domain"], e["temperature_scaled"], e["metric"], e["region"]): e for e in evaluation["results"]}
    lines = [
        f"Of this model alone, on {evaluation['dataset']}: mean ± standard deviation over cases, and how many of the "
        "cases are undefined where any is. TS: with a temperature fitted on the validation cases; the other lines are "
        "the decoder's own probabilities.",
        "",
        "| Domain | Probabilities | Cases | " + " | ".join(column.title for column in columns) + " |",
        "|---|---|---:|" + "---:|" * len(columns),
    ]
    for domain, scaled in dict.fromkeys(key[:2] for key in found):
        entries = [found.get((domain, scaled, column.metric, column.region)) for column in columns]
        cells = [_cell(column, entry) for column, entry in zip(columns, entries, strict=True)]
        trained = evaluation["source"] and domain == evaluation["source"] == source
        name = f"{evaluation['domain_kind']} {domain}".strip() or "test cases"
        cases = max(entry["cases"] for entry in entries if entry)
        role = " (test cases of the source)" if trained else ""
        lines.append(f"| {_escape(name)}{role} | {'TS' if scaled else 'own'} | {cases} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"* {column.title}: {column.definition}." for column in columns)])


def _cell(column: tables.Column, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "not measured"
    text = "undefined" if entry["mean"] is None else tables.number(column, entry["mean"], entry["sd"])
    return text + (f" (undef. {entry['undefined']}/{entry['cases']})" if entry["undefined"] else "")


def _calibration(name: str | None, params: Mapping[str, Any] | None) -> str:
    if name is None or params is None:
        return "No calibrator is part of the bundle: the probabilities are the decoder's own."
    origin = params["provenance"]
    text = (
        f"`calibrator.json` holds the calibrator {name}, fitted on the validation cases ({len(origin['cases'])}), "
        f"region {origin['region']}; launch.predict applies it unless told --nocalibrate."
    )
    if not params["identifiable"]:
        return f"{text} It changes nothing: {params['reason']}."
    dsc = origin.get("validation_dsc", {})  # not of earlier versions
    if dsc and dsc["before"] is not None and dsc["after"] is not None:
        text += f" Mean DSC of these cases: {100 * dsc['before']:.1f} points before, {100 * dsc['after']:.1f} after."
    return (
        f"{text} NLL of the voxels it was fitted on: {params['nll_before']:.4f} before, {params['nll_after']:.4f} "
        "after, which is no evidence of its effect on other cases."
    )


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
