"""Tools for tests: a recorder, a clock, a broker with faults; and suites for brokers of your own.

The fixture ``silbo_events`` of the pytest plugin, ``silbo_pytest``, is an :class:`EventRecorder`.
"""

from silbo.testing.clock import Clock
from silbo.testing.faulty_broker import FaultyBroker
from silbo.testing.recorder import EventRecorder

__all__ = ["Clock", "EventRecorder", "FaultyBroker"]
