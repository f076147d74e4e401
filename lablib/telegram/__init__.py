"""Messages to a Telegram chat when a training or an experiment ends or fails."""

from lablib.telegram.notifier import TelegramError, TelegramNotifier

__all__ = ["TelegramError", "TelegramNotifier"]
