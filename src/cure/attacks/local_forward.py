"""Logits of images that differ from known ones in a small square, for less work.

A convolution sees a few pixels: where only a square of the image changes, only a somewhat larger
square of each of its first feature maps does.  Those maps are kept, and their changed squares
computed; the layers after that, where the squares cover most of the map, run as usual.  The
logits are the same up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cure.models.fuse import TOLERANCE

LIMIT = 0.5
"""Largest share of a feature map that is worth computing alone."""

Region = tuple[int, int, int, int]
"""Top, bottom, left and right of a rectangle; bottom and right are the first outside."""

_POINTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Identity)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_BY_CONSTANT = (operator.add, operator.sub, operator.mul, operator.truediv)


class LocalNetwork(nn.Module):
    """A network that can be asked for logits after a change in a square of all images.

    Args:
        network: in evaluation mode, its weights fixed; [B, C, H, W] to logits [B, K].
        example: images that it takes, to compare with the network; where its code cannot be
            traced, or the logits differ, :attr:`usable` is False.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.network = network
        self._passes = _traced(network, example)
        self._square: Region | None = None
        self.train(network.training)

    @property
    def usable(self) -> bool:
        """Whether a change in a square costs less than all passes."""
        return self._passes is not None

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K]; inside :meth:`changed`, by what the square changes."""
        if self._passes is None or self._square is None:
            logits: Tensor = self.network(image)
            return logits
        return self._passes.change(image, self._square)

    def begin(self, image: Tensor, side: int) -> None:
        """Keep the feature maps of ``image`` for changes in squares of ``side`` pixels."""
        if self._passes is not None:
            self._passes.plan(side)
            self._passes.fill(image)

    @contextmanager
    def changed(self, top: int, left: int, side: int) -> Iterator[None]:
        """Inside, the images given are those that are kept, but for this square."""
        self._square = (top, top + side, left, left + side)
        try:
            yield
        finally:
            self._square = None

    def settle(self, stays: Tensor) -> None:
        """Keep the last change of the images ``stays`` [B] only."""
        if self._passes is not None:
            self._passes.undo(~stays)

    def select(self, stays: Tensor) -> None:
        """Forget the images that are not in ``stays`` [B]."""
        if self._passes is not None:
            self._passes.maps = {n: kept[stays] for n, kept in self._passes.maps.items()}


@torch.no_grad()
def _traced(network: nn.Module, example: Tensor) -> _Passes | None:
    """What runs the network node by node; None where that is not possible or not the same."""
    try:
        passes = _Passes(fx.symbolic_trace(network))
        expected = network(example)
        height, width = example.shape[-2:]
        side = max(1, min(height, width) // 8)
        passes.fill(example)
        passes.plan(side)
        if not passes.local:
            return None
        passes.fill(example)
        image = example.clone()
        bound = TOLERANCE * expected.abs().max().clamp_min(1.0)
        # At each edge and inside; the last change is taken back.
        for top, left in ((0, 0), (height // 2 - 1, width // 3), (height - side, width - side)):
            image[..., top : top + side, left : left + side] = (
                1 - image[..., top : top + side, left : left + side]
            )
            came = passes.change(image, (top, top + side, left, left + side))
            if not bool(((came - network(image)).abs() <= bound).all()):
                return None
        passes.maps = {}
        return passes
    except Exception:  # whatever the code of a network does with a stand-in for a tensor
        return None


class _Passes(fx.Interpreter):
    """Runs a traced network; see :class:`LocalNetwork`.

    Attributes:
        local: nodes of which only a region changes, with what kind of operation they are.
        maps: results of those that others read beyond the region.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.local: dict[fx.Node, str] = {}
        self.maps: dict[fx.Node, Tensor] = {}
        self.read_whole: set[fx.Node] = set()
        self.regions: dict[fx.Node, Region] = {}
        self.patches: dict[fx.Node, Tensor] = {}
        self.before: dict[fx.Node, Tensor] = {}
        self.filling = False

    # -- which nodes ---------------------------------------------------------------------------

    def plan(self, side: int) -> None:
        """Choose the nodes that are worth it for squares of ``side`` pixels; needs shapes."""
        sizes: dict[fx.Node, tuple[int, int]] = {}
        self.local = {}
        for node in cast(fx.GraphModule, self.module).graph.nodes:
            kind = self.kind(node)
            sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
            if kind is None or any(source not in self.local for source in sources):
                continue
            height, width = (
                max((sizes[source][axis] for source in sources), default=side) for axis in (0, 1)
            )
            if kind == "convolution":
                layer = self.layer(node)
                height, width = (
                    (size + layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1)
                    // layer.stride[axis]
                    + 1
                    for axis, size in enumerate((height, width))
                )
            rows, columns = self.shapes[node][-2:]
            if min(height, rows) * min(width, columns) <= LIMIT * rows * columns:
                self.local[node] = kind
                sizes[node] = height, width
        self.read_whole = {
            node
            for node in self.local
            if any(self.local.get(user) not in ("pointwise", "constant") for user in node.users)
        }

    def layer(self, node: fx.Node) -> nn.Conv2d:
        """The convolution that a node calls."""
        return cast(nn.Conv2d, self.fetch_attr(str(node.target)))

    def kind(self, node: fx.Node) -> str | None:
        """What a node does to a region: None where that is not known."""
        if node.op == "placeholder":
            return "image"
        if len(self.shapes.get(node, ())) != 4:
            return None
        if node.op == "call_module":
            layer = self.fetch_attr(str(node.target))
            if type(layer) is nn.Conv2d:
                plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
                return "convolution" if plain else None
            fixed = isinstance(layer, nn.BatchNorm2d | nn.Dropout) and not layer.training
            return "pointwise" if fixed or isinstance(layer, _POINTWISE) else None
        if node.target in (F.relu, torch.relu, "relu", "relu_"):
            return "pointwise"
        images = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if node.target in (*_ADDITIONS, "add", "add_") and len(node.args) == 2 and not node.kwargs:
            shapes = {self.shapes.get(source) for source in images}
            if len(images) == 2 and len(shapes) == 1:
                return "sum"
        if node.target in _BY_CONSTANT and len(images) == 1:
            others = [self.value(word) for word in node.args if word is not images[0]]
            flat = all(not isinstance(o, Tensor) or o.shape[-2:] in ((1, 1), ()) for o in others)
            return "constant" if flat else None
        return None

    def value(self, word: Any) -> Any:
        """An argument that does not depend on the image."""
        return self.fetch_attr(str(word.target)) if isinstance(word, fx.Node) else word

    # -- running -------------------------------------------------------------------------------

    def fill(self, image: Tensor) -> None:
        """Run everything; keep shapes, and the maps of the nodes that are planned."""
        self.maps, self.filling = {}, True
        try:
            self.run(image)
        finally:
            self.filling = False

    def change(self, image: Tensor, square: Region) -> Tensor:
        """Logits of images that are those of the last fill, and settled changes, but for a square.

        Args:
            image: [B, C, H, W], with the change.
            square: where it is.
        """
        self.regions, self.patches, self.before = {}, {}, {}
        self.square = square
        logits: Tensor = self.run(image)
        return logits

    def undo(self, rows: Tensor) -> None:
        """Take the last change back in these images [B]."""
        for node, patch in self.before.items():
            top, bottom, left, right = self.regions[node]
            self.maps[node][..., top:bottom, left:right][rows] = patch[rows]
        self.before = {}

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node; of one that is local only its region is computed."""
        if not self.filling and n in self.local and n.op != "placeholder":
            return self.run_local(n)
        result = super().run_node(n)
        if self.filling:
            if isinstance(result, Tensor):
                self.shapes[n] = result.shape
            if n in self.read_whole and n.op != "placeholder":
                # A copy: a later operation may work in place.
                self.maps[n] = result.clone()
        elif n.op == "placeholder":
            self.regions[n], self.image = self.square, result
        return result

    def run_local(self, node: fx.Node) -> Tensor | None:
        """Compute the region of a node that a change reaches; its whole map, where it is kept."""
        kind = self.local[node]
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if kind == "convolution":
            region, patch = self.convolved(node, sources[0])
        else:
            spans = [self.regions[source] for source in sources]
            tops, bottoms, lefts, rights = zip(*spans, strict=True)
            region = (min(tops), max(bottoms), min(lefts), max(rights))
            parts = {source: self.part(source, region) for source in sources}
            patch = self.applied(node, kind, parts)
        self.regions[node], self.patches[node] = region, patch
        if node not in self.read_whole:
            return None
        top, bottom, left, right = region
        place = self.maps[node][..., top:bottom, left:right]
        self.before[node] = place.clone()
        place.copy_(patch)
        return self.maps[node]

    def part(self, node: fx.Node, region: Region) -> Tensor:
        """A region of the result of a node."""
        if node in self.patches and self.regions[node] == region:
            return self.patches[node]
        top, bottom, left, right = region
        whole = self.image if node.op == "placeholder" else self.maps[node]
        return whole[..., top:bottom, left:right]

    def applied(self, node: fx.Node, kind: str, parts: dict[fx.Node, Tensor]) -> Tensor:
        """A pointwise operation, a sum of two maps or one with a constant, on their regions."""
        values = list(parts.values())
        if kind == "sum":
            return values[0] + values[-1]
        if kind == "constant":
            words = [
                parts[word] if isinstance(word, fx.Node) and word in parts else self.value(word)
                for word in node.args
            ]
            result: Tensor = cast(Any, node.target)(*words)
            return result
        if node.op == "call_module":
            # A copy, because the layer may work in place.
            made: Tensor = self.fetch_attr(str(node.target))(values[0].clone())
            return made
        return values[0].relu()

    def convolved(self, node: fx.Node, source: fx.Node) -> tuple[Region, Tensor]:
        """The region of a convolution that depends on the region of its source."""
        layer = self.layer(node)
        region: list[int] = []
        reach: list[int] = []
        missing: list[int] = []
        for axis, (first, end) in enumerate((self.regions[source][:2], self.regions[source][2:])):
            stride, padding = layer.stride[axis], cast(tuple[int, int], layer.padding)[axis]
            extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            size, there = self.shapes[node][2 + axis], self.shapes[source][2 + axis]
            low = min(max(0, -((extent - first - padding) // stride)), size - 1)
            high = min(size, max((end - 1 + padding) // stride + 1, low + 1))
            begin, stop = low * stride - padding, (high - 1) * stride - padding + extent + 1
            region += [low, high]
            reach += [max(begin, 0), min(stop, there)]
            missing += [max(-begin, 0), max(stop - there, 0)]
        seen = self.part(source, cast(Region, tuple(reach)))
        if any(missing):
            seen = F.pad(seen, (*missing[2:], *missing[:2]))
        patch = F.conv2d(
            seen, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups
        )
        return cast(Region, tuple(region)), patch

    # -- what runs as usual must not write into maps that are kept --------------------------------

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As in the network, on copies of maps that are kept."""
        return super().call_function(target, self._copied(args), kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As :meth:`call_function`."""
        return super().call_method(target, self._copied(args), kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As :meth:`call_function`; a convolution writes nothing."""
        if type(self.fetch_attr(str(target))) is nn.Conv2d:
            return super().call_module(target, args, kwargs)
        return super().call_module(target, self._copied(args), kwargs)

    def _copied(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = {id(tensor) for tensor in self.maps.values()}
        return tuple(a.clone() if isinstance(a, Tensor) and id(a) in kept else a for a in args)
