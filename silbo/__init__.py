"""The dispatcher that Whistle gives you, with a bridge to Redis that loses nothing and costs next to nothing."""

from silbo._whistle import IAsyncEventDispatcher
from silbo.dispatcher import AsyncEventDispatcher
from silbo.event import DomainEvent, ECSTEvent, Event, NotificationEvent
from silbo.listeners import FIRST, LAST, ListenerRow, Registration
from silbo.message import Delivery, Message
from silbo.names import EventName
from silbo.subscriber import on

__version__ = "0.1.0"
