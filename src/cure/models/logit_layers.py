"""Which layers of a network make its logits, found while it computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def width_of(module: nn.Module) -> int | None:
    """Outputs of a linear layer or 1x1 convolution; None of any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
        return module.out_channels
    return None


class LogitLayers:
    """Watches the linear layers and 1x1 convolutions of a network during one pass with autograd.

    Args:
        network: inside its wrappers; :meth:`end` takes the hooks off again.
    """

    def __init__(self, network: nn.Module) -> None:
        self.width: dict[str, int] = {}
        self.layer_of: dict[Any, str] = {}  # nodes of the graph, and parameters used by themselves
        self.hidden = False
        """Whether a layer computed out of sight of autograd."""
        self.handles = []
        for name, module in network.named_modules():
            width = width_of(module)
            if width is None:
                continue
            self.width[name] = width
            self.layer_of |= dict.fromkeys(module.parameters(), name)

            def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:  # noqa: ARG001
                if isinstance(output, Tensor) and output.grad_fn is not None:
                    self.layer_of[output.grad_fn] = name
                else:
                    self.hidden = True

            self.handles.append(module.register_forward_hook(look))

    def end(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def of(self, logits: Tensor) -> tuple[str, ...] | None:
        """Names of the layers, as wide as the logits, whose outputs reach them through no other.

        Args:
            logits: [B, classes] or [B], as the network returned them.

        Returns:
            None where this cannot be told.
        """
        width = logits.shape[1] if logits.dim() > 1 else 1
        nodes, seen = [logits.grad_fn], set()
        found: set[str] = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            # The weight of a layer whose forward is not called.
            name = self.layer_of.get(node) or self.layer_of.get(getattr(node, "variable", None))
            if name is None:
                nodes += [following for following, _ in node.next_functions]
            elif self.width[name] == width:
                found.add(name)
        if not found and (self.hidden or logits.grad_fn is None):
            return None
        return tuple(name for name in self.width if name in found)


def same_weights(network: nn.Module, name: str) -> list[str]:
    """Names of other layers that share a parameter with the layer of that name."""
    own = {id(parameter) for parameter in network.get_submodule(name).parameters()}
    return [
        other
        for other, module in network.named_modules()
        if other != name
        and not name.startswith(f"{other}.")
        and not other.startswith(f"{name}.")
        and other
        and any(id(parameter) in own for parameter in module.parameters(recurse=False))
    ]
