"""Recipes: every one that ships is right, and mistakes are named all at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cure
from cure.config import Ratio, RunConfig
from cure.errors import ConfigError, CureNote, notes_kept
from cure.recipe import (
    check,
    check_kept,
    dump,
    load_recipe,
    override,
    parse_override,
    read_recipe,
    recipe_names,
)
from cure.registry import METHODS
from cure.training.setup import training_attack
from cure.utils.engine import Engine

# What a recipe for the user's own model leaves to the user.
_DIGITS = ["data.source=digits", "model.name=small_cnn", "start=scratch"]
OWN = {
    "finetune": _DIGITS,
    "photos": [*_DIGITS, "data.color=keep", "data.resize=null", "data.augment.crop_padding=1"],
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_valid_and_survives_its_own_dump(name: str) -> None:
    config = load_recipe(name, OWN.get(name, []))
    assert config.name == name
    assert config.description
    assert check(yaml.safe_load(dump(config)), "dump") == config


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_runs_when_shrunk(name: str, tmp_path: Path) -> None:
    """The same method, schedule and start, on digits with a small network for two epochs."""
    small = {"wide_resnet": "{name: wide_resnet, options: {depth: 10, width: 1}}"}
    config = load_recipe(name, OWN.get(name, []))
    model = config.model.name
    tiny = small.get(model, "{name: small_cnn, options: {width: 4}}")
    run = cure.train(
        name,
        [
            *OWN.get(name, []),
            f"model={tiny}",
            "data.source=digits",
            "data.limit=200",
            "data.validation=100",
            "natural.epochs=1",
            "training.epochs=2",
            "training.batch_size=32",
            "training.optimizer.learning_rate=0.01",
            "attack.steps=2",
            *(["method.revision={rate: 0.2, horizon: 1.0}"] * (config.method.name == "cure")),
            # small_cnn has no layer called conv1 behind the first
            *(["method.mask.layers=matrices"] if "released" in name else []),
        ],
        run=tmp_path / "run",
        quiet=True,
    )
    assert [record["epoch"] for record in run.metrics] == [1, 2]
    assert (run.path / "natural").exists() == (run.config.start == "natural")


def test_a_method_without_soft_labels_is_told_what_to_set(tmp_path: Path) -> None:
    changes = [*OWN["photos"], "method=mart", "data.augment.cutmix=1"]
    changes += ["data.augment.label_smoothing=0.1"]
    expected = (
        "cutmix and label_smoothing need .* got mart; set data.augment.cutmix=0 "
        "data.augment.label_smoothing=0$"
    )
    with pytest.raises(ConfigError, match=expected):
        cure.train("photos", changes, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def paper(name: str) -> tuple[float, float, float]:
    method = load_recipe(name).method
    return method.percent, method.alpha, method.gamma  # type: ignore[attr-defined]


def test_the_rows_of_table_9() -> None:
    assert paper("cifar10-resnet18-cure") == (30, 0.1, 1.0)
    assert paper("cifar100-resnet18-cure") == (30, 0.1, 1.0)
    assert paper("svhn-resnet18-cure") == (30, 0.2, 1.0)
    assert paper("cifar10-wrn-34-10-cure") == (50, 0.3, 0.5)
    assert paper("cifar100-wrn-34-10-cure") == (50, 0.3, 0.5)
    assert paper("cifar10-preactresnet18-cure") == (20, 0.2, 1.0)


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.endswith("-cure")])
def test_the_common_settings_of_the_paper(name: str) -> None:
    config = load_recipe(name)
    training, method = config.training, config.method
    assert (training.epochs, training.batch_size) == (200, 128)
    assert (training.optimizer.learning_rate, training.optimizer.momentum) == (0.1, 0.9)
    assert training.optimizer.weight_decay == 5e-4
    assert load_recipe(f"{name}-printed-decay").training.optimizer.weight_decay == 5e-3
    assert (config.threat.norm, float(config.threat.epsilon)) == ("Linf", 8 / 255)
    assert (config.attack.steps, float(config.attack.step_size)) == (10, 2 / 255)
    assert method.beta == 1.0  # type: ignore[attr-defined]
    revision = method.revision  # type: ignore[attr-defined]
    assert (revision.rate, revision.decay) == (0.2, 0.999)


def test_every_mistake_is_named_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            "digits",
            ["training.epoch=3", "method.percnt=20", "attack.steps=-3", "seed=x", "model.nme=a"],
        )
    message = str(caught.value)
    assert "5 mistakes" in message
    for part in ("'epochs'", "'percent'", "attack.steps", "seed", "did you mean 'name'"):
        assert part in message


def test_a_method_is_found_by_its_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cure'"):
        load_recipe("digits", ["method={name: cuer}"])


def test_ratios_are_parsed_not_evaluated() -> None:
    assert Ratio("8/255") == 8 / 255
    assert str(Ratio("8/255")) == "8/255"
    for text in ("__import__('os')", "8//255", "", "2*4"):
        with pytest.raises(ValueError, match="expected a number"):
            Ratio(text)
    with pytest.raises(ValueError, match="divides by zero"):
        Ratio("1/0")


def test_a_recipe_extends_a_neighbour_and_its_own_words_win(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: digits\nname: mine\ntraining: {epochs: 3}\n")
    (tmp_path / "more.yaml").write_text("extends: mine\nname: more\nmethod: {percent: 10}\n")
    config = load_recipe(tmp_path / "more.yaml")
    assert (config.name, config.training.epochs, config.training.batch_size) == ("more", 3, 64)
    assert config.method.percent == 10  # type: ignore[attr-defined]
    (tmp_path / "loop.yaml").write_text("extends: loop\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_recipe(tmp_path / "loop.yaml")
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("word", "pair"),
    [
        ("training.epochs=3", ("training.epochs", 3)),
        ("threat.epsilon=8/255", ("threat.epsilon", "8/255")),
        ("a=[0.5, 0.75]", ("a", [0.5, 0.75])),
        ("a=null", ("a", None)),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_overrides_are_yaml(word: str, pair: tuple[str, object]) -> None:
    assert parse_override(word) == pair


def test_every_field_has_a_help_text() -> None:
    def fields(section: type) -> None:
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, f"{section.__name__}.{name} has no docstring"
            kind = field.annotation
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                fields(kind)

    fields(RunConfig)


def test_a_bare_name_stands_for_a_section() -> None:
    config = load_recipe(
        "digits",
        ["method=trades", "method.beta=3", "model=resnet10", "training.schedule=constant"],
    )
    assert (config.method.name, config.method.beta) == ("trades", 3)  # type: ignore[attr-defined]
    assert (config.model.name, config.training.schedule.name) == ("resnet10", "constant")


@pytest.mark.parametrize("words", [["method.name=trades"], ["method=trades"]])
def test_another_method_has_none_of_the_settings_of_the_one_before(words) -> None:
    """CURE's beta is 1, and TRADES has its own 6."""
    with notes_kept() as notes:
        config = load_recipe("cifar10-resnet18-cure", words)
    assert config.method == METHODS["trades"].Config()
    if words == ["method.name=trades"]:
        assert notes == [
            "method.name=trades drops the settings of cure: percent, alpha, gamma, revision"
        ]


def test_the_same_method_keeps_its_settings_and_later_words_count() -> None:
    with notes_kept() as notes:
        config = load_recipe("cifar10-resnet18-cure", ["method.name=cure", "method.alpha=0.2"])
    assert (config.method.percent, config.method.alpha) == (30, 0.2)
    assert not notes
    changed = load_recipe("digits", ["method.name=trades", "method.beta=2"])
    assert changed.method.beta == 2


@pytest.mark.parametrize(
    ("name", "alpha", "epochs", "decay"),
    [
        ("cifar10-resnet18-cure-released", 0.5, 200, 5e-4),
        ("cifar10-resnet18-cure-released-readme", 0.1, 120, 7e-4),
    ],
)
def test_released_recipes(name, alpha, epochs, decay) -> None:
    """Defaults of the released code, and the values of its README; neither clamps the start."""
    config = load_recipe(name)
    assert (config.method.alpha, config.training.epochs) == (alpha, epochs)
    assert config.training.optimizer.weight_decay == decay
    assert config.method.mask.layers == "conv1"
    attack = training_attack(config, Engine(torch.device("cpu")))
    assert not attack.clamp_start
    assert training_attack(load_recipe("digits"), Engine(torch.device("cpu"))).clamp_start


def test_a_folder_with_the_name_of_a_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert read_recipe("photos")["name"] == "photos"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threat.epsilon", 8, "for images in \\[0, 1\\], got 8; .* say 8/255"),
        ("threat", {"norm": "L2", "epsilon": 128}, "16 or less in L2 .* say 128/255"),
        (
            "attack.step_size",
            2,
            "  - attack.step_size: .* got 2; say attack.step_size=2/255",
        ),
        (
            "model",
            {"name": "resnet18", "mean": [124, 116, 104], "std": [58, 57, 57]},
            "divide mean and std by 255",
        ),
    ],
)
def test_values_in_units_of_255_are_refused_with_what_is_meant(
    key: str, value: Any, message: str
) -> None:
    raw = read_recipe("digits")
    override(raw, key, value)
    with pytest.raises(ConfigError, match=message):
        check(raw, "recipe")


def test_the_key_of_a_start_goes_with_its_path() -> None:
    raw = read_recipe("digits")
    override(raw, "start", "best.pt")
    override(raw, "start.key", "ema")
    config = check(raw, "recipe")
    assert (config.start, config.start_key) == ("best.pt", "ema")


def test_units_of_a_run_that_exists_are_not_questioned() -> None:
    raw = yaml.safe_load(dump(load_recipe("digits")))
    raw["attack"]["step_size"] = 2
    raw["threat"]["epsilon"] = 8
    with pytest.raises(ConfigError, match="epsilon"):
        check(raw, "recipe")
    assert float(check_kept(raw, "run").threat.epsilon) == 8


def test_on_and_off_are_words_and_true_and_false_are_not() -> None:
    assert parse_override("start_check=off") == ("start_check", "off")
    assert parse_override("training.x=yes")[1] == "yes"
    assert [parse_override(f"a={word}")[1] for word in ("true", "False", "1", "null")] == [
        *(True, False, 1, None)
    ]
    assert load_recipe("digits", ["start_check=off"]).start_check == "off"


def test_a_method_s_settings_may_come_before_its_name() -> None:
    assert load_recipe("digits", ["method.beta=3", "method=trades"]).method.beta == 3
    assert load_recipe("digits", ["method.gamma=5", "method=cure"]).method.gamma == 5
    with pytest.raises(ConfigError, match="betta"):
        load_recipe("digits", ["method.betta=1", "method=trades"])


def test_settings_in_a_section_may_come_before_the_section() -> None:
    words = ["training.epochs=3", "training={batch_size: 8}"]
    for order in (words, words[::-1]):
        training = load_recipe("digits", order).training
        assert (training.epochs, training.batch_size) == (3, 8)


def test_the_training_attack_of_photos_follows_the_threat() -> None:
    words = ["data.source=x", "model.name=small_cnn"]
    assert load_recipe("photos", words).training_epsilon == 5 / 255  # to the bit
    assert load_recipe("photos", [*words, "threat.epsilon=8/255"]).training_epsilon == 10 / 255
    assert load_recipe("photos", [*words, "attack.epsilon=3/255"]).training_epsilon == 3 / 255
    assert load_recipe("digits").training_epsilon == load_recipe("digits").threat.epsilon


def test_epochs_go_before_the_minutes_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("extends: digits\ntraining: {minutes: 5}\n")
    recipe = tmp_path / "short.yaml"
    assert load_recipe(recipe).training.minutes == 5
    assert load_recipe(recipe, ["training.epochs=3"]).training.minutes is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack.epsilon=0"], "attack.epsilon"),
        (["training.optimizer.nesterov=true", "training.optimizer.momentum=0"], "nesterov"),
        (["training.optimizer={name: adamw, nesterov: true}"], "nesterov"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", words)


def test_a_whole_section_notes_which_settings_of_the_recipe_it_drops() -> None:
    with pytest.warns(
        CureNote, match=r"training=\{\.\.\.\} .* drops .*batch_size.*training.epochs="
    ):
        load_recipe("digits", ["training={epochs: 5}"])
    with pytest.warns(CureNote, match=r"method=\{\.\.\.\} .* drops .*revision"):
        load_recipe("digits", ["method={name: cure, gamma: 3}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recipe("digits", ["method={name: trades, beta: 3}", "attack.steps=2"])
