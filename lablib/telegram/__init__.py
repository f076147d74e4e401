"""Messages to a Telegram chat when a training or an experiment ends or fails."""

from lablib.telegram.callback import ExperimentMessages, TelegramCallback
from lablib.telegram.notifier import TelegramError, TelegramNotifier

__all__ = ["ExperimentMessages", "TelegramCallback", "TelegramError", "TelegramNotifier"]
