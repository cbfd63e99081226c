"""Reads what a trainer wrote: a file becomes named tensors and sizes. Nothing here knows of transformers."""

from hf_model.trainers.architecture import Architecture, infer_architecture
from hf_model.trainers.checkpoint import Checkpoint, read_checkpoint
from hf_model.trainers.tensors import widest

__all__ = ["Architecture", "Checkpoint", "infer_architecture", "read_checkpoint", "widest"]
