"""States of a backbone in which no program may stand in for it."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from cet.partition.fingerprint import GLOBAL_HOOKS, codes_of, followed_hooks, names_in
from cet.partition.stages import Stages


def obstacle_to_cutting(backbone: nn.Module) -> str | None:
    """Why the backbone must run as it is now; None where it may be cut.

    Raises:
        ValueError: for a backbone that is in a state in which rows depend on each other.
    """
    reason = None
    explicit = isinstance(backbone, Stages)  # its stages call the submodules, hooks and modes included
    for path, module in backbone.named_modules():
        name = f"submodule {path!r}" if path else "the backbone"
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{name} was compiled in place, which hides its exits; compile the model instead: "
                "torch.compile(model) on the cet.EarlyExit"
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise ValueError(
                f"{name} is quantised dynamically, by a scale that the rows of a batch share; quantise the weights "
                "alone, as torchao's weight-only configurations do"
            )
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} normalises by the statistics of the batch, as it is in train mode, so that rows depend on "
                "each other; call model.eval()"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name} keeps no statistics and normalises by those of the batch, so that rows depend on each other; "
                "make it with track_running_stats=True"
            )
        if explicit:
            continue
        if module.training and _depends_on_mode(module.__class__):
            reason = reason or f"{name} is in train mode while the model is in eval mode"
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in followed_hooks(hooks).values():
                if not _is_of_torch(hook):
                    reason = reason or f"{name} has a forward hook, which sees and may change what passes"
    if any(followed_hooks(hooks) for hooks in GLOBAL_HOOKS) and not explicit:
        reason = reason or "there is a forward hook on all modules, which sees and may change what passes"
    if reason is None and any(is_sharded(parameter) for parameter in backbone.parameters()):
        reason = "its weights are sharded over processes, and gathered submodule by submodule"
    if any(tensor.is_inference() for tensor in (*backbone.parameters(), *backbone.buffers())):
        raise ValueError(
            "the backbone's weights were made within torch.inference_mode(), which lets nobody record them; make the "
            "backbone outside of it"
        )
    if any(parameter.is_meta for parameter in backbone.parameters()):
        if not any(hasattr(module, "_hf_hook") for module in backbone.modules()):
            raise ValueError(
                "the backbone's weights are on the meta device, which holds no values; give them some by "
                "model.to_empty(device=...) and load_state_dict"
            )
        reason = reason or "its weights are offloaded, and come to the device call by call"
    return reason


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 makes them."""
    return type(tensor).__name__ == "DTensor"


@cache
def _depends_on_mode(kind: type) -> bool:
    """Whether a method of a class reads ``self.training``, or may do so in a function of its closure."""
    return any("training" in names_in(code) or set(code.co_freevars) - {"__class__"} for code in codes_of(kind))


def _is_of_torch(hook: object) -> bool:
    """Whether a hook belongs to pruning, weight or spectral normalisation, which export records as they are."""
    return type(hook).__module__.startswith("torch.nn.utils.")
