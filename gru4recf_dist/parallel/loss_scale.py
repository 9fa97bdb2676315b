"""The factor on the loss that keeps fp16 gradients from vanishing, and what happens when one overflows."""

from __future__ import annotations

from gru4recf_dist.config import LossScaleConfig


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", ICLR 2018).

    It halves when a gradient is not finite, and that step is skipped; it doubles after ``growth_steps`` steps without.
    Powers of two, so that scaling rounds nothing.

    Args:
        config: None for a precision that needs no scaling: then it is 1 for ever, and nothing may overflow.
    """

    def __init__(self, config: LossScaleConfig | None) -> None:
        self._config = config
        self.value = 1.0 if config is None else config.initial
        self._good_steps = 0

    def update(self, finite: bool) -> bool:
        """Take note of how a step went.

        Returns:
            whether that is in order: its update may be made, or it is skipped because of the scale, which is now
            smaller. If not, it was not finite, and a smaller scale cannot help.
        """
        config = self._config
        if finite:
            self._good_steps += 1
            if config is not None and self._good_steps == config.growth_steps:
                self.value, self._good_steps = min(self.value * 2.0, config.largest), 0
            return True
        if config is None or self.value <= 1.0:
            return False
        self.value, self._good_steps = self.value / 2.0, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where ``state`` was; a precision without scaling ignores it."""
        if self._config is not None and state.get("value", 1.0) > 1.0:
            self.value, self._good_steps = state["value"], int(state["good_steps"])
