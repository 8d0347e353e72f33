"""The operations of the exit step, each with its definition in plain PyTorch and its compiled kernels."""

from cet.ops.backend import use_backend
from cet.ops.compact import compact, put_rows
from cet.ops.consistent_exit_loss import consistent_exit_loss
from cet.ops.exit_gate import exit_gate, exit_score, gate
from cet.ops.exit_step import exit_step

__all__ = ["compact", "consistent_exit_loss", "exit_gate", "exit_score", "exit_step", "gate", "put_rows", "use_backend"]
