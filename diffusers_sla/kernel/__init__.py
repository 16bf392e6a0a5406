"""Sparse-linear attention on torch and triton alone; this folder can be exported and used without the package."""

from . import layers
from .api import select_blocks, sla_attention

__all__ = ["layers", "select_blocks", "sla_attention"]
