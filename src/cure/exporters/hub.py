"""A folder in the form of the Hugging Face hub: weights, configuration, preprocessing, card."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from cure.attacks.registry import attack_label
from cure.errors import ConfigError, ModelError
from cure.methods import METHODS
from cure.models import save_weights
from cure.models.artefact import CONFIG, SECTION, TIMM_WEIGHTS, WEIGHTS
from cure.models.contract import Contract
from cure.models.wrapper import Selected, core
from cure.utils.io import first_line, write_json, write_text

PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"
_BICUBIC = 3


def write_hub_folder(folder: Path, model: nn.Module, contract: Contract) -> None:
    """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, ``README.md``.

    Where the architecture is one of transformers or timm, ``config.json`` is theirs, with one more
    key, and their own functions load the folder.

    Args:
        folder: to make.
        model: the network.
        contract: what is known of it.
    """
    folder.mkdir()
    save_weights(model, folder / WEIGHTS, contract.metadata())
    write_json(folder / CONFIG, _config(model, contract))
    write_json(folder / PREPROCESSOR, _preprocessor(contract))
    write_text(folder / CARD, card(contract))


def push_folder(folder: Path, repository: str) -> None:
    """Upload a folder to a repository on the hub; where there is none, a private one is made.

    Raises:
        ModelError: when the hub refuses or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi

        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:
        raise ModelError(
            f"{folder} was written, but the hub did not take it as {repository} "
            f"({first_line(error)}); log in with `hf auth login`, then upload it with "
            f"`{shlex.join(['hf', 'upload', repository, str(folder)])}`"
        ) from error


def _config(model: nn.Module, contract: Contract) -> dict[str, Any]:
    """Configuration in the form of transformers, of timm, or of this package."""
    name, classes = str(contract.network["name"]), contract.classes
    section = {SECTION: contract.model_dump(mode="json")}
    if name.startswith("hf:"):
        config: Any = core(model).config
        if any(isinstance(module, Selected) for module in model.modules()):
            return dict(config.to_dict()) | section
        # Trained here, where logits are in the order of the data's classes.
        return dict(config.to_dict()) | _labels(classes) | section
    if name.startswith("timm:"):
        size = [contract.preprocessing.channels, *contract.preprocessing.size]
        constants = contract.normalisation
        known = getattr(core(model), "pretrained_cfg", None) or {}
        options = {
            key: value
            for key, value in contract.network["options"].items()
            if key not in (*TIMM_WEIGHTS, "num_classes", "in_chans")
        }
        return {
            "architecture": name.removeprefix("timm:"),
            "num_classes": len(classes),
            "model_args": options | {"in_chans": size[0]},
            "label_names": classes,
            "pretrained_cfg": {
                "num_classes": len(classes),
                "input_size": size,
                # timm gives networks with a fixed size the argument img_size, which others lack.
                "fixed_input_size": bool(known.get("fixed_input_size")),
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center" if contract.preprocessing.fit == "crop" else "squash",
                "mean": constants.mean if constants else [0.0] * size[0],
                "std": constants.std if constants else [1.0] * size[0],
            },
        } | section
    return {
        "architectures": [type(core(model)).__name__],
        "model_type": "cure",
        "num_labels": len(classes),
    } | (_labels(classes) | section)


def _labels(classes: list[str]) -> dict[str, Any]:
    """Names of the logits, as in configurations of transformers."""
    return {
        "id2label": {str(number): text for number, text in enumerate(classes)},
        "label2id": {text: number for number, text in enumerate(classes)},
    }


def _preprocessor(contract: Contract) -> dict[str, Any]:
    """Steps from an image file to the network's core, as processors of transformers do them."""
    height, width = contract.preprocessing.size
    channels = contract.preprocessing.channels
    constants = contract.normalisation
    steps: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
    }
    if contract.preprocessing.fit == "crop":
        steps = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": min(height, width)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return steps | {
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": constants.mean if constants else [0.0] * channels,
        "image_std": constants.std if constants else [1.0] * channels,
        "do_convert_rgb": channels == 3,
    }


def card(contract: Contract) -> str:
    """The model card: metadata of the hub with each accuracy as a metric, then text."""
    name = contract.run.get("name", "model")
    results: dict[str, Any] = {
        "task": {"type": "image-classification"},
        "dataset": {
            "name": contract.data.get("name", "images"),
            "type": contract.data.get("name", "images"),
            "split": next((part.split for part in contract.accuracies), "none"),
        },
        "metrics": [
            {
                "type": "accuracy",
                "name": _metric_name(part.attack, part.norm, part.epsilon),
                "value": round(part.accuracy, 2),
            }
            for part in contract.accuracies
        ],
    }
    method = str(contract.run.get("method"))
    robust = method not in METHODS or METHODS[method].selection == "robust"
    head: dict[str, Any] = {
        "library_name": "cure",
        "pipeline_tag": "image-classification",
        "tags": [*(["adversarial-robustness"] if robust else []), "image-classification"],
    }
    if contract.accuracies:
        head["model-index"] = [{"name": name, "results": [results]}]
    rows = [
        f"| {_metric_name(part.attack, part.norm, part.epsilon)} | {part.accuracy:.1f} | "
        f"{part.interval[0]:.1f} to {part.interval[1]:.1f} | {part.n:,} | {part.split} |"
        for part in contract.accuracies
    ]
    table = ["| accuracy | % | 95 % interval | images | split |", "|---|---|---|---|---|", *rows]
    threat = f"{contract.threat['norm']} {contract.threat['epsilon']}"
    size = "x".join(map(str, (*contract.preprocessing.size, contract.preprocessing.channels)))
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {name}",
        "",
        f"An image classifier trained with the method `{method}` "
        + ("" if robust else "on unchanged images, not ")
        + f"to withstand adversarial changes within {threat}."
        + (
            ""
            if (shares := contract.run.get("shares")) is None
            else " Its weights were mixed with those of its start afterwards (shares "
            f"{shares}, the start's first)."
        ),
        "",
        *(table if rows else ["Not evaluated: run `cure evaluate`, then export again."]),
        "",
        *(f"Warning: {warning}.\n" for warning in contract.warnings),
        f"Images: {size}, {contract.preprocessing.fit} (bicubic, antialiased), 8-bit values "
        f"divided by 255. Classes: {', '.join(contract.classes)}.",
        "",
        "```python",
        "import cure",
        "",
        'model = cure.from_pretrained("FOLDER")  # images [B, C, H, W] in [0, 1] to logits',
        "```",
        "",
        "Limits: accuracies hold for images like those that were measured and for changes within "
        "the threat; a robust network is still wrong on some attacked images.",
        "",
    ]
    return "\n".join(lines)


def _metric_name(attack: str, norm: str | None, epsilon: str | None) -> str:
    if norm is None:
        return "natural accuracy" if attack == "natural" else attack_label(attack)
    return f"{attack_label(attack)}, {norm} {epsilon}"


def check_repository(name: str) -> None:
    """Refuse what is no ``owner/name`` of the hub, or to push without its package.

    Raises:
        ConfigError: in one sentence.
    """
    try:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError:
        raise ConfigError("push needs huggingface_hub: pip install 'cure-at[hub]'") from None
    if name.count("/") != 1 or not all(name.split("/")):
        raise ConfigError(f"push: expected owner/name, got '{name}'")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push: {first_line(error)}") from None
