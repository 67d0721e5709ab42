"""What devices can do: the `Target` type and its versioned data files."""

from qat.targets.load import load_target, target_names
from qat.targets.rule import OperatorRule, Use
from qat.targets.target import Refusal, Target

__all__ = ["OperatorRule", "Refusal", "Target", "Use", "load_target", "target_names"]
