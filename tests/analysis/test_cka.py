"""The study ``cka``: closed forms, a plain implementation, any network, and what is kept."""

from __future__ import annotations

import gc
import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cure
from cure.analysis import cka as study
from cure.analysis.cka import Similarity, centred_gram, cka, layers_of, linear_cka
from cure.analysis.study import STUDIES
from cure.attacks import Threat
from cure.attacks.registry import evaluation_attack
from cure.config import ModelConfig
from cure.errors import ConfigError, DataError, ModelError
from cure.models import build_model
from helpers import Command, bright_or_dark, refused

IMAGES = bright_or_dark(50)


def features(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_cka(x: Any, y: Any, debiased: bool) -> float:
    """By the definitions, with n x n matrices."""
    first, second, n = x @ x.T, y @ y.T, len(x)

    def hsic(k: Any, m: Any) -> float:
        if not debiased:
            h = np.eye(n) - 1 / n
            return float(np.trace(k @ h @ m @ h))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return float((np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))

    return hsic(first, second) / math.sqrt(hsic(first, first) * hsic(second, second))


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("wide", "other"), [(3, 5), (60, 5), (60, 70)])
def test_linear_cka_is_the_definition(debiased: bool, wide: int, other: int) -> None:
    x = features(20, wide) + 3
    y = torch.cat([x[:, :2] + 0.3 * features(20, 2, 1), features(20, other - 2, 2)], dim=1)
    expected = plain_cka(x.numpy(), y.numpy(), debiased)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("debiased", [True, False])
def test_linear_cka_ignores_rotation_scale_and_shift_only(debiased: bool) -> None:
    x, y = features(30, 8), features(30, 8, 1) + features(30, 8)
    turn, _ = torch.linalg.qr(features(8, 8, 2))
    found = linear_cka(x, y, debiased=debiased)
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1, abs=1e-12)
    assert linear_cka(7 * x @ turn + 100, y, debiased=debiased) == pytest.approx(found, abs=1e-10)
    stretched = x * torch.linspace(0.1, 5, 8, dtype=torch.float64)
    assert abs(linear_cka(stretched, y, debiased=debiased) - found) > 0.01


def test_only_the_unbiased_estimator_is_nought_for_unrelated_features() -> None:
    pairs = [(features(20, 50, s), features(20, 50, s + 1000)) for s in range(200)]
    debiased = np.array([linear_cka(x, y) for x, y in pairs])
    biased = np.array([linear_cka(x, y, debiased=False) for x, y in pairs])
    assert abs(debiased.mean()) < 3 * debiased.std() / math.sqrt(200)
    assert biased.min() > 0.5
    # Features of different images, exactly orthogonal once centred.
    wave = torch.arange(12, dtype=torch.float64) * math.pi / 6
    assert linear_cka(wave.cos()[:, None], wave.sin()[:, None], debiased=False) < 1e-20


def test_linear_cka_of_constant_features_and_of_what_does_not_fit() -> None:
    assert math.isnan(linear_cka(torch.ones(5, 3), features(5, 3)))
    for x, y in ((features(5, 3), features(6, 3)), (features(5, 3)[0], features(5, 3))):
        with pytest.raises(DataError, match="same n samples"):
            linear_cka(x, y)
    with pytest.raises(DataError, match="at least 4 samples, got 3"):
        linear_cka(features(3, 2), features(3, 2))
    assert linear_cka(features(3, 2), features(3, 2), debiased=False) == pytest.approx(1)


def test_one_batch_gives_linear_cka_also_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_COLUMNS", 7)
    x, y = features(25, 30), features(25, 30, 1) + features(25, 30)
    similarity = Similarity()
    one = [centred_gram((x + 50).view(25, 3, 5, 2)), centred_gram(y)]
    similarity.add(one, one[1:])
    expected = torch.tensor([[linear_cka(x, y)], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(similarity.matrix(), expected, atol=1e-6, rtol=0)
    (third, *_) = similarity.thirds()
    assert third["interval"] is None


def test_the_size_of_batches_matters_within_the_error_only() -> None:
    x = features(3000, 6)
    y = x @ features(6, 4, 1) + 2 * features(3000, 4, 2)
    whole = linear_cka(x, y)
    for size in (8, 20, 100, 700):
        similarity, biased = Similarity(), []
        for rows in torch.arange(3000).split(size):
            similarity.add([centred_gram(x[rows])], [centred_gram(y[rows])])
            biased.append(linear_cka(x[rows], y[rows], debiased=False))
        assert similarity.matrix().item() == pytest.approx(whole, abs=0.025)
        if size == 8:
            assert np.mean(biased) > whole + 0.2


def test_a_short_last_batch_weighs_as_little_as_it_has_images() -> None:
    similarity = Similarity()
    alike, unlike = features(96, 3), features(4, 3, 1)
    similarity.add([centred_gram(alike)], [centred_gram(alike)])
    similarity.add([centred_gram(unlike)], [centred_gram(features(4, 3, 2))])
    parts = [
        (96, plain_hsic(alike, alike), plain_hsic(alike, alike), plain_hsic(alike, alike)),
        (
            4,
            plain_hsic(unlike, features(4, 3, 2)),
            plain_hsic(unlike, unlike),
            plain_hsic(features(4, 3, 2), features(4, 3, 2)),
        ),
    ]
    cross, first, second = (sum(p[0] * p[place] for p in parts) for place in (1, 2, 3))
    assert similarity.matrix().item() == pytest.approx(cross / math.sqrt(first * second), rel=1e-5)
    assert similarity.matrix(without=1).item() == pytest.approx(1)


def plain_hsic(x: Tensor, y: Tensor) -> float:
    """The mean over all ordered choices of four different samples."""
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    n = len(x)
    if n > 10:
        return unbiased(k, m)
    terms = [
        k[a, b] * m[a, b] + k[a, b] * m[c, d] - 2 * k[a, b] * m[a, c]
        for a, b, c, d in permutations(range(n), 4)
    ]
    return float(np.mean(terms))


def unbiased(k: Any, m: Any) -> float:
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    mixed = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float(((k * m).sum() + mixed - 2 * (k @ m).sum() / (n - 2)) / (n * (n - 3)))


def test_the_estimator_is_the_mean_over_fours_of_samples() -> None:
    x, y = features(7, 3), features(7, 4, 1)
    expected = plain_hsic(x, y)
    assert unbiased((x @ x.T).numpy(), (y @ y.T).numpy()) == pytest.approx(expected, abs=1e-12)
    found = (centred_gram(x) * centred_gram(y)).sum().item() / (7 * 4)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_jackknife_covers_the_truth() -> None:
    hits = 0
    truth = linear_cka(features(40000, 3, 5), features(40000, 3, 5) + features(40000, 3, 6))
    for trial in range(60):
        similarity = Similarity()
        for number in range(8):
            x = features(12, 3, 100 * trial + 10 * number + 7000)
            y = x + features(12, 3, 100 * trial + 10 * number + 7001)
            similarity.add([centred_gram(x)] * 3, [centred_gram(y)] * 3)
        low, high = similarity.thirds()[0]["interval"]
        hits += low <= truth <= high
    assert hits >= 50  # of 60; 57 are expected.


# Networks.


class Shared(nn.Module):
    """One ReLU module in place twice, an output in a tuple, and things that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.pair = Pair()
        self.count = Count()
        self.table = Table()
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(3, 3)
        self.shortcut = nn.Sequential()
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.act(self.first(image))
        hidden, _ = self.pair(self.shortcut(hidden))
        hidden = self.drop(self.act(self.second(hidden)))
        self.count(hidden)
        hidden = hidden + self.table(hidden)[0]
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits


class Pair(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return hidden.tanh(), "aside"


class Count(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.argmax()


class Table(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros(2, 1)


def image_of(count: int) -> Tensor:
    return IMAGES.image[:count].float() / 255


def test_layers_are_calls_in_their_order_and_hooks_go() -> None:
    torch.manual_seed(0)
    network = Shared().eval()
    layers = layers_of(network, image_of(4))
    assert layers.names == ["first", "act", "pair", "second", "act (2)", "head"]
    assert layers.left_out == {
        "count": "returns no tensor of real numbers",
        "table": "its output has no row for each image",
    }
    image = image_of(10)
    grams = dict(zip(layers.names, layers.grams(image), strict=True))
    with torch.no_grad():
        first = network.first(image)
        hidden = network.second(first.relu().tanh())
    # What the ReLU in place overwrites right afterwards is seen as it was.
    for name, value in (("first", first), ("second", hidden), ("act (2)", hidden.relu())):
        torch.testing.assert_close(grams[name], centred_gram(value))
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_go_when_the_network_fails() -> None:
    network = Shared().eval()
    layers = layers_of(network, image_of(4))
    with pytest.raises(RuntimeError):
        layers.grams(torch.zeros(5, 3, 8, 8))
    assert not any(module._forward_hooks for module in network.modules())


def test_patterns_choose_any_modules_and_wrong_ones_are_refused() -> None:
    section = ModelConfig(name="resnet10", options={"width": 4})
    network = build_model(section, classes=2, channels=1, size=(8, 8), seed=0).eval()
    image = image_of(4)
    assert layers_of(network, image, ["layer?.?", "linear"]).names == [
        *(f"layer{stage}.0" for stage in (1, 2, 3, 4)),
        "linear",
    ]
    leaves = layers_of(network, image).names
    assert leaves[:3] == ["conv1", "bn1", "layer1.0.conv1"]
    assert "layer1.0.shortcut" not in leaves
    assert "layer2.0.shortcut.1" in leaves
    with pytest.raises(ConfigError, match=r"got 'block\*'; its modules: conv1"):
        layers_of(network, image, ["linear", "block*"])


def test_attention_of_pytorch_is_one_layer_and_a_vit_has_many() -> None:
    vit = build_model(
        ModelConfig(name="vit", options={"dim": 12, "depth": 2, "heads": 2}),
        classes=2,
        channels=1,
        size=(8, 8),
        seed=0,
    ).eval()
    names = layers_of(vit, image_of(4)).names
    assert names[:5] == [
        "patch",
        "layers.0.norm1",
        "layers.0.attention.qkv",
        "layers.0.attention.out",
        "layers.0.norm2",
    ]
    assert names[-2:] == ["norm", "linear"]

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 2)

        def forward(self, image: Tensor) -> Tensor:
            token = image[:, 0]
            mixed, _ = self.attention(token, token, token)
            logits: Tensor = self.linear(mixed.mean(dim=1))
            return logits

    assert layers_of(Attends().eval(), image_of(4)).names == ["attention", "linear"]


def test_features_are_dropped_layer_by_layer() -> None:
    network = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(7))).eval()
    layers = layers_of(network, torch.rand(4, 1, 40, 40))
    most = 0

    def large_tensors() -> list[Tensor]:
        return [
            thing
            for thing in gc.get_objects()
            if type(thing) is Tensor and thing.numel() >= 8 * 1600
        ]

    gc.collect()
    others = large_tensors()  # of other tests; held, so that no id is used again
    before = {id(thing) for thing in others}

    def look(*_: object) -> None:
        nonlocal most
        alive = {id(thing) for thing in large_tensors()}
        most = max(most, len(alive - before))

    for module in network:
        module.register_forward_hook(look)
    grams = layers.grams(torch.rand(8, 1, 40, 40))
    assert [gram.shape for gram in grams] == [(8, 8)] * 7
    # The batch, a layer's input and output; not seven layers.
    assert 1 <= most <= 4


# The verb.


class Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 2)

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        hidden = torch.relu_(self.norm(self.conv(image)))
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


def test_one_network_with_itself_under_attack() -> None:
    told: list[tuple[str, int, int]] = []
    result = cka(
        Small(0),
        data=IMAGES,
        limit=22,
        batch_size=10,
        epsilon="128/255",
        progress=lambda *words: told.append(words),
    )
    assert result["n"] == 20  # Two images are too few for the estimator.
    assert told == [("cka", 10, 20), ("cka", 20, 20)]
    (found,) = result["maps"]
    assert found["first"] == {"model": "Small", "input": "natural"}
    assert found["second"] == {"model": "Small", "input": "adversarial"}
    assert found["layers"] == [["conv", "norm", "linear"]] * 2
    assert [len(row) for row in found["matrix"]] == [3, 3, 3]
    diagonal = [found["matrix"][place][place] for place in range(3)]
    assert [third["mean"] for third in found["thirds"]] == pytest.approx(diagonal)
    # The images that PGD-20 gives in an evaluation, batch by batch.
    network, similarity = Small(0).eval(), Similarity()
    attack = evaluation_attack("pgd20").parts["pgd20"]
    for number in (0, 1):
        rows = slice(10 * number, 10 * number + 10)
        image, label = image_of(20)[rows], IMAGES.label[rows]
        made = attack.run(network, image, label, Threat("Linf", 128 / 255), 0, number)
        with torch.no_grad():
            similarity.add(*([centred_gram(network.conv(x))] for x in (image, made)))
    assert diagonal[0] == pytest.approx(similarity.matrix().item(), abs=1e-6)
    again = cka(Small(0), data=IMAGES, limit=22, batch_size=10, epsilon="128/255")
    assert again["maps"] == result["maps"]
    # Without a change, nothing changes; and with it, something does.
    still = cka(Small(0), data=IMAGES, limit=22, batch_size=10, epsilon="1e-9")
    assert still["maps"][0]["matrix"][0][0] == pytest.approx(1, abs=1e-5)
    assert min(diagonal) < 0.995


def test_two_networks_on_the_same_images() -> None:
    result = cka(Small(0), other=Small(1), data=IMAGES, batch_size=25)
    natural, adversarial = result["maps"]
    assert natural["first"] == {"model": "Small", "input": "natural"}
    assert natural["second"] == {"model": "Small-2", "input": "natural"}
    assert adversarial["second"] == {"model": "Small-2", "input": "adversarial"}
    # One batch of all images: the plain definition on the features themselves.
    with torch.no_grad():
        x, y = (Small(seed).conv(image_of(50)).flatten(1).numpy() for seed in (0, 1))
    whole = cka(Small(0), other=Small(1), data=IMAGES, batch_size=50)["maps"][0]["matrix"][0][0]
    assert whole == pytest.approx(plain_cka(x.astype(float), y.astype(float), True), abs=1e-5)
    same = cka(Small(0), other=Small(0), data=IMAGES)["maps"]
    for found in same:
        assert [found["matrix"][place][place] for place in range(3)] == pytest.approx([1, 1, 1])


def test_networks_of_other_depth_and_features_that_do_not_vary() -> None:
    flat = Small(0)
    nn.init.zeros_(flat.linear.weight)
    deep = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 2)
    )
    result = cka(flat, other=deep, data=IMAGES)
    assert result["maps"][0]["thirds"] is None
    assert [len(result["maps"][0]["matrix"]), len(result["maps"][0]["matrix"][0])] == [3, 4]
    assert result["maps"][0]["matrix"][2] == [None] * 4
    json.dumps(result, allow_nan=False)
    view = STUDIES["cka"].view(result)
    assert "Small and Sequential, natural - (most similar layers)" in view.finding
    assert view.tables[0].rows[0][2:] == ["-"] * 3
    pictures = view.pictures()
    assert [drawn.name for drawn in pictures] == ["cka-map-1", "cka-map-2"]
    assert "blank cells are not defined" in pictures[0].description


def test_a_single_layer_is_a_late_one() -> None:
    result = cka(Small(0), other=Small(1), data=IMAGES, layers=["linear"])
    (value,) = result["maps"][0]["matrix"][0]
    assert [third["mean"] for third in result["maps"][0]["thirds"]] == [None, None, value]
    assert f"Small and Small-2, natural {value:.3f}" in STUDIES["cka"].view(result).finding


def test_names_of_a_result_cannot_draw_or_inject() -> None:
    result = cka(Small(0), data=IMAGES, limit=20, batch_size=10)
    text = json.dumps(result).replace('"Small"', '"$\\\\frac{a}$ <script>alert(1)</script>"')
    hostile = json.loads(text.replace('"conv"', '"$x^2$<b>"'))
    view = STUDIES["cka"].view(hostile)
    curves, heat = view.pictures()
    for drawn in (curves, heat):
        assert "<script" not in drawn.svg
        assert "<b>" not in drawn.svg
    assert "$x^2$&lt;b&gt;" in curves.svg
    assert "$\\frac{a}$" in curves.svg
    assert "$\\frac{a}$" in view.finding


def test_deep_networks_are_drawn_with_joined_layers() -> None:
    layers = [f"layer {number}" for number in range(200)]
    matrix = [[0.5] * 200 for _ in layers]
    matrix[0][0] = None
    thirds = [{"name": n, "mean": 0.5, "interval": None} for n in ("early", "middle", "late")]
    ends = {"model": "deep", "input": "natural"}, {"model": "deep", "input": "adversarial"}
    deep = {"first": ends[0], "second": ends[1], "layers": [layers] * 2}
    result = {"maps": [deep | {"matrix": matrix, "thirds": thirds}], "n": 10}
    result["threat"] = {"norm": "Linf", "epsilon_text": "8/255"}
    view = STUDIES["cka"].view(result)
    assert [map_.rows[1] for map_ in view.figures[1].maps] == ["layer 7"]
    _, drawn = view.pictures()
    assert "up to 7 x 7 layers" in drawn.description
    assert len(drawn.svg) < 160_000


def test_what_cannot_be_studied_is_said() -> None:
    class Probabilities(Small):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).softmax(dim=1)

    with pytest.raises(ModelError, match="probabilities"):
        cka(Probabilities(0), data=IMAGES)
    with pytest.raises(ConfigError, match="at least 4 images"):
        cka(Small(0), data=IMAGES, limit=3)
    with pytest.raises(ConfigError, match="batches of at least 4"):
        cka(Small(0), data=IMAGES, batch_size=3)
    with pytest.raises(ConfigError, match="to compare"):
        cka(other=Small(0), data=IMAGES)
    with pytest.raises(ConfigError, match="pgd20 is an attack in Linf or L2"):
        cka(Small(0), data=IMAGES, norm="L1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cka") / "tiny"
    settings = ["method={name: natural}", "start=scratch", "training.epochs=1"]
    cure.train("digits", [*settings], run=path, quiet=True)
    return path


def test_the_command(run: Path, command: Command, tmp_path: Path) -> None:
    ended = command("analyse", "cka", run, "--limit", 40, "--batch-size", 20)
    assert ended.status == 0, ended.err
    assert "Linear CKA of late layers" in ended.out
    kept = json.loads((run / "studies" / "cka-1.json").read_text())
    assert kept["n"] == 40
    assert kept["format"] == "cure-study-1"
    assert sorted(path.name for path in (run / "studies").iterdir()) == [
        "cka-1-layers-1.svg",
        "cka-1-map-1.svg",
        "cka-1.json",
    ]
    out = tmp_path / "out.json"
    refused(command("analyse", "cka", run, "--layers", "nothing*", "--output", out), "nothing*")
    refused(command("analyse", "cka", run, "--limit", 2, "--output", out), "at least 4 images")
    refused(command("analyse", "cka", tmp_path / "none", "--output", out), "none")
    assert not out.exists()
    out.write_text("kept")
    refused(command("analyse", "cka", run, "--output", out), "exists and is kept")
