"""Noticing that a training diverges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qat.train.settings import GuardSettings

#: weight of a step in the moving average of the loss
_WEIGHT = 0.1


class Guard:
    """Watches the loss of every step.

    Args:
        settings: What counts as divergence, and what is done about it.

    Attributes:
        rate: What the learning rate is multiplied with: `factor` to the power of the returns so far.
        returns: How often training went back to a good state.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.rate, self.returns = 1.0, 0
        self.forget()

    def forget(self) -> None:
        """Begin a new record of the loss: what it measures has changed (another phase), or training went back."""
        self._mean, self._steps, self._lowest, self._last = 0.0, 0, math.inf, -math.inf

    @property
    def calm(self) -> bool:
        """Whether the last loss was no sign of trouble, so that now is a good state to return to."""
        return self._last <= self._limit

    @property
    def _limit(self) -> float:
        if self._lowest == math.inf:
            return math.inf
        return max(self.settings.blow_up * self._lowest, self._lowest + 1.0)

    def see(self, loss: float) -> str | None:
        """Take note of a loss; return what is wrong with it, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self._last = loss
        self._steps += 1
        # the mean of all losses at first, then an exponential average
        self._mean += (loss - self._mean) * max(_WEIGHT, 1.0 / self._steps)
        if self._mean > self._limit:
            return f"the loss rose to {self._mean:.4g} from {self._lowest:.4g}"
        self._lowest = min(self._lowest, self._mean)
        return None

    def step_back(self) -> bool:
        """Lower the rate for another try; False where there were enough."""
        if self.returns >= self.settings.retries:
            return False
        self.returns += 1
        self.rate *= self.settings.factor
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        lowest, last = (None if math.isinf(v) else v for v in (self._lowest, self._last))
        return {
            "rate": self.rate,
            "returns": self.returns,
            "mean": self._mean,
            "steps": self._steps,
            "lowest": lowest,
            "last": last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rate, self.returns = float(state["rate"]), int(state["returns"])
        self._mean, self._steps = float(state["mean"]), int(state["steps"])
        self._lowest = math.inf if state["lowest"] is None else float(state["lowest"])
        self._last = -math.inf if state["last"] is None else float(state["last"])
