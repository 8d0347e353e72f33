"""The operations of the exit step, each with its definition in plain PyTorch."""

from cet.ops.compact import compact
from cet.ops.consistent_exit_loss import consistent_exit_loss
from cet.ops.exit_gate import exit_gate, exit_score

__all__ = ["compact", "consistent_exit_loss", "exit_gate", "exit_score"]
