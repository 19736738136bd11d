"""timm's models, which carry their configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.adapters import Adapter


class Timm(Adapter):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        """Subclasses too, wherever they are defined."""
        return any(kind.__module__.startswith("timm.") for kind in type(model).__mro__)

    def example_inputs(self, model: nn.Module) -> Tensor | None:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        size = config.get("input_size")
        if size is None:
            return None
        parameter = next(model.parameters(), torch.empty(0))
        return torch.rand(1, *size, device=parameter.device, dtype=parameter.dtype)

    def aliases(self, model: Any) -> dict[str, str]:
        """The modules that timm takes features from, as it names them and with "_" for ".": models made with
        `features_only=True` have the modules under the second name, or inside a module `model`."""
        info = getattr(model, "feature_info", None) or []
        modules, aliases = dict(model.named_modules()), {}
        for entry in getattr(info, "info", info):
            name = str(entry.get("module", ""))
            names = (name, name.replace(".", "_"))
            path = next((path for path in (*names, f"model.{name}") if path in modules), "")
            if path:
                aliases.update(dict.fromkeys(names, path))
        return aliases
