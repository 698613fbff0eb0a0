"""Training without the fused CUDA mixers of mamba_ssm, which read projection weights past the modules that hold them.

In training, and without a cache, transformers' mixers first call one kernel for everything: Mamba-1's takes the weights
of x_proj, dt_proj and out_proj, Mamba-2's that of out_proj. A LoRA adapter on such a module would then do nothing
(peft's issues 2274, 2556 and 3554). Falcon-Mamba never trains with it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


def whole_mixer(original: Callable[..., Any]) -> Callable[..., Any]:
    """A fused function that declines Falcon-Mamba's norms on dt, B and C.

    mamba_ssm has dt normed after its projection instead of before, which is another function than the one that is
    evaluated, and leaves these norms out of its gradients (`MambaInnerFn` in ops/selective_scan_interface.py).
    """

    @functools.wraps(original)
    def fused(projected: Any, *weights: Any, **options: Any) -> Any:
        return None if options.get("dt_rms_weight") is not None else original(projected, *weights, **options)

    return fused


def _nothing(*_: object, **__: object) -> None:
    """What transformers takes for: no fused kernel here."""
