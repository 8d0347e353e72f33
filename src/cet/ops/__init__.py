"""The operations of the exit step and of training, each with its definition in plain PyTorch and its kernels."""

from cet.ops.backend import use_backend
from cet.ops.compact import Compaction, compact, scatter_rows
from cet.ops.consistent_exit_loss import consistent_exit_loss
from cet.ops.exit_gate import exit_gate, exit_score, gate
from cet.ops.exit_step import exit_step
from cet.ops.registration import Choice, explain

__all__ = [
    "Choice",
    "Compaction",
    "compact",
    "consistent_exit_loss",
    "exit_gate",
    "exit_score",
    "exit_step",
    "explain",
    "gate",
    "scatter_rows",
    "use_backend",
]
