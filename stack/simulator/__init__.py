"""A provider that isn't one: SendGrid's and SMTP's wire formats, with faults on demand.

Run it with ``python -m stack.simulator --help``. It records every accepted message by our id, so
that duplicates and losses can be counted from the provider's side, and sends signed webhooks
back. :func:`fate` predicts what becomes of a message.
"""

from stack.simulator.config import SimulatorConfig, updated
from stack.simulator.fate import EventKind, Fate, FateEvent, fate

__all__ = ["EventKind", "Fate", "FateEvent", "SimulatorConfig", "fate", "updated"]
