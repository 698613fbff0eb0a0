"""Training without the fused CUDA mixers of mamba_ssm, which read projection weights past the modules that hold them.

In training, and without a cache, transformers' mixers first call one kernel for everything: Mamba-1's takes the weights
of x_proj, dt_proj and out_proj, Mamba-2's that of out_proj. A LoRA adapter on such a module would then do nothing
(peft's issues 2274, 2556 and 3554).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

FUSED = {
    "mamba": "mamba_inner_fn",
    "falcon_mamba": "mamba_inner_fn",
    "mamba2": "mamba2_split_conv1d_scan_combined",
    "zamba2": "mamba2_split_conv1d_scan_combined",
}
"""The fused function in the modeling file of each type; Hymba's mixer here calls none."""


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, mixers in training go through their projections as modules, kernel by kernel."""
    modules = {
        importlib.import_module(f"transformers.models.{family}.modeling_{family}"): name
        for family, name in FUSED.items()
    }
    originals = {module: getattr(module, name) for module, name in modules.items()}
    try:
        for module, name in modules.items():
            setattr(module, name, _nothing)
        yield
    finally:
        for module, name in modules.items():
            setattr(module, name, originals[module])


def _nothing(*_: object, **__: object) -> None:
    """What transformers takes for: no fused kernel here."""
