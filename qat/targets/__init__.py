"""What devices can do: the `Target` type and its versioned data files."""

from qat.targets.load import load_target, target_names
from qat.targets.target import OperatorRule, Target

__all__ = ["OperatorRule", "Target", "load_target", "target_names"]
