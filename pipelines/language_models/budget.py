"""A hard cap on tokens for questions that are sent at the same time."""

import threading

from .config import JudgeError


class Budget:
    """Tokens that may be spent. Before a question is sent its largest cost is set aside, so the cap cannot be passed.

    Safe for several threads: one that finds too little left waits while others may still give back.
    """

    def __init__(self, cap: int):
        self.cap, self.spent = cap, 0
        self._aside = 0
        self._changed = threading.Condition()

    def set_aside(self, tokens: int) -> None:
        """Raises JudgeError where the cap leaves no room."""
        with self._changed:
            while self.spent + self._aside + tokens > self.cap:
                if self._aside == 0:
                    raise JudgeError(self._reached(tokens))
                self._changed.wait()
            self._aside += tokens

    def settle(self, aside: int, spent: int) -> None:
        """What was set aside came to `spent`."""
        with self._changed:
            self._aside -= aside
            self.spent += spent
            self._changed.notify_all()

    def _reached(self, tokens: int) -> str:
        if not self.spent:
            return (
                f"judge.max_total_tokens = {self.cap:,} is too small for one question, which may take up to "
                f"{tokens:,} tokens: raise it"
            )
        return (
            f"judge.max_total_tokens = {self.cap:,} is reached: {self.spent:,} tokens are spent and the next question "
            f"may take up to {tokens:,}; answers so far are kept, raise it and give the same command again"
        )
