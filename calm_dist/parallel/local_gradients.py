"""Gradients of a module summed on this rank over the micro-batches of a step.

ZeRO-2 reduces a gradient over all ranks as soon as its backward pass is over, once per micro-batch.
Here every micro-batch but the last runs on aliases of the parameters, whose gradients are summed in
fp32, and the last backward pass adds these sums to its own gradient before ZeRO sees it. So each
step has one reduction, and a bf16 gradient is rounded once instead of once per micro-batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


class LocalGradients:
    """Local gradient sums of the parameters of ``module``.

    The module is replicated, not partitioned: its parameters are complete at every forward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._sums: dict[str, torch.Tensor] = {}
        # The sums of the parameters of the first micro-batch, in the order of its backward pass.
        self._flat, self._order = torch.empty(0), list[str]()
        self._new: dict[str, torch.Tensor] = {}
        self._last = True
        self._hooks = [
            parameter.register_hook(partial(self._complete, name))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def run(self, *inputs: Any) -> Any:
        """The module's output for a micro-batch that is not the last; its backward pass adds to the
        sums and leaves the parameters' gradients alone."""
        self._add_new()
        self._last = False
        aliases = {}
        for name, parameter in self._module.named_parameters():
            # Made again each time: the optimizer may have replaced the parameter's storage.
            alias = parameter.detach().requires_grad_(parameter.requires_grad)
            if alias.requires_grad:
                alias.register_post_accumulate_grad_hook(partial(self._take, name))
            aliases[name] = alias
        return torch.func.functional_call(self._module, aliases, inputs)

    def before_last(self) -> None:
        """Must be called before the forward pass of the last micro-batch, which runs on the
        parameters themselves."""
        self._add_new()
        self._last = True

    def check_complete(self) -> None:
        """Must be called after the last backward pass.

        Raises:
            RuntimeError: a parameter took part in earlier micro-batches only.
        """
        self._add_new()
        if self._sums:
            raise RuntimeError(
                f"head parameter {next(iter(self._sums))}: has a gradient from earlier "
                "micro-batches of the step but none from the last; every micro-batch must use it"
            )

    @torch.no_grad()
    def _take(self, name: str, alias: torch.Tensor) -> None:
        assert alias.grad is not None
        if name in self._new:
            # In a pipeline, another forward pass need not come between two backward passes.
            self._add_new()
        self._new[name], alias.grad = alias.grad, None

    @torch.no_grad()
    def _add_new(self) -> None:
        """Add the gradients of the last micro-batch to the sums, all in one kernel: a head has
        dozens of small ones."""
        new, self._new = self._new, {}
        if not new:
            return
        if self._sums and [*new] != self._order:
            for name, gradient in new.items():
                if name in self._sums:
                    self._sums[name].add_(gradient)
                else:
                    self._sums[name] = gradient.float()
            return
        flat = torch.cat([gradient.flatten() for gradient in new.values()])
        if self._sums:
            self._flat.add_(flat)
            return
        self._flat, self._order = flat.float(), [*new]
        parts = self._flat.split([gradient.numel() for gradient in new.values()])
        self._sums = {
            name: part.view(gradient.shape)
            for part, (name, gradient) in zip(parts, new.items(), strict=True)
        }

    def _complete(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The last micro-batch's gradient of a parameter, plus the sums of the earlier ones."""
        if not self._last:
            raise RuntimeError(
                f"head parameter {name}: has a gradient in a micro-batch that ran on its alias; a "
                "head that recomputes activations must call checkpoint with use_reentrant=False"
            )
        self._add_new()
        sums = self._sums.pop(name, None)
        if not self._sums:
            self._flat = torch.empty(0)
        return gradient if sums is None else sums.add_(gradient).to(gradient.dtype)
