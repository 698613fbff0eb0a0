"""Hymba (Dong et al. 2024): attention and Mamba heads side by side in every layer, as a transformers model.

Reads the published configuration and weights of nvidia/Hymba-1.5B-Base without any code that comes with them.
"""

from .configuration import HymbaConfig
from .modeling import HymbaForCausalLM, HymbaModel

__all__ = ["HymbaConfig", "HymbaForCausalLM", "HymbaModel"]
