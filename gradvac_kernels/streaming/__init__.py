"""One mixed batch, one forward, one backward: each task's gradients without T passes and without T x P numbers.

The way of a gradient: ``capture`` sees every operation of the forward pass and asks ``samples`` where the samples lie
(``placement`` has the rules, ``places`` what a place is, ``operations`` the names); where they meet a parameter,
``rules`` say how that use is kept apart by task; in the backward pass the use is delivered to a sink (``sinks``), which
adds it up in a slab (``arena``) with ``task_rows`` and vaccinates the group when it is complete.
"""

from .arena import Arena
from .capture import Capture, is_active
from .loss import task_mean_loss
from .model import check_modules, coarse_groups
from .rules import register_rule
from .sinks import BufferSink, Sink, StreamSink

__all__ = [
    "Arena",
    "BufferSink",
    "Capture",
    "Sink",
    "StreamSink",
    "check_modules",
    "coarse_groups",
    "is_active",
    "register_rule",
    "task_mean_loss",
]
