"""The dispatcher that Whistle gives you, with a bridge to Redis that loses nothing and costs next to nothing."""

from silbo import errors
from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import Bridge
from silbo.consumer import Consumer
from silbo.dispatcher import AsyncEventDispatcher
from silbo.errors import SilboError
from silbo.event import DomainEvent, ECSTEvent, Event, NotificationEvent
from silbo.incoming import receive
from silbo.listeners import FIRST, LAST, ListenerRow, Registration
from silbo.maps import EventMap, RequestMap
from silbo.mediator import Mediator
from silbo.message import Delivery, Message, Origin
from silbo.middleware import LoggingMiddleware, Middleware
from silbo.names import EventName, name_of
from silbo.observers import Call, Dispatch, Observer
from silbo.outbox import Outbox
from silbo.protocols import Publisher, Subscription
from silbo.relay import Relay
from silbo.requests import EventHandler, Request, RequestHandler, Response
from silbo.retry import Backoff
from silbo.routing import Route
from silbo.stored import Quota
from silbo.subscriber import on
from silbo.trace import Trace
from silbo.wiring import bootstrap

__version__ = "0.1.0"

__all__ = [
    "FIRST",
    "LAST",
    "AsyncEventDispatcher",
    "Backoff",
    "Bridge",
    "Call",
    "Consumer",
    "Delivery",
    "Dispatch",
    "DomainEvent",
    "ECSTEvent",
    "Event",
    "EventHandler",
    "EventMap",
    "EventName",
    "IAsyncEventDispatcher",
    "ListenerRow",
    "LoggingMiddleware",
    "Mediator",
    "Message",
    "Middleware",
    "NotificationEvent",
    "Observer",
    "Origin",
    "Outbox",
    "Publisher",
    "Quota",
    "Registration",
    "Relay",
    "Request",
    "RequestHandler",
    "RequestMap",
    "Response",
    "Route",
    "SilboError",
    "Subscription",
    "Trace",
    "bootstrap",
    "errors",
    "name_of",
    "on",
    "receive",
]
