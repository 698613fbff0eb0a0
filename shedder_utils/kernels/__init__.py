"""CPU scans for Mamba-1 and Mamba-2: fast, differentiable, without a compiler at the user's site."""

from .conv import causal_conv
from .patching import active, install, installed, uninstall
from .selective_scan import selective_scan
from .ssd import ssd

__all__ = ["active", "causal_conv", "install", "installed", "selective_scan", "ssd", "uninstall"]
