"""The dispatcher that Whistle gives you, with a bridge to Redis that loses nothing and costs next to nothing."""

from silbo import errors
from silbo._message_observers import Attempt, Publishing, RelayedBatch
from silbo._retry import Backoff
from silbo._whistle import IAsyncEventDispatcher
from silbo.bootstrap import bootstrap
from silbo.bridge import Bridge, Route
from silbo.consumer.consumer import Consumer
from silbo.consumer.receive import receive
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.in_thread import in_thread
from silbo.dispatch.listeners import FIRST, LAST, ListenerRow, Registration
from silbo.dispatch.observers import Call, Dispatch, Observer
from silbo.dispatch.subscribers import on
from silbo.dispatch.sync_callers import Portal, run_sync
from silbo.dispatch.trace import Trace
from silbo.errors import SilboError
from silbo.event import DomainEvent, ECSTEvent, Event, NotificationEvent, Refusal, set_header
from silbo.health import Health
from silbo.mediator.maps import EventMap, RequestMap
from silbo.mediator.mediator import Mediator
from silbo.mediator.middleware import LoggingMiddleware, Middleware
from silbo.mediator.requests import EventHandler, Request, RequestHandler, Response
from silbo.message import Delivery, Message, Origin
from silbo.names import EventName, name_of
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Relay
from silbo.outbox.rows import Quota
from silbo.plugins.entry_points import FoundPlugin, find_plugins
from silbo.plugins.plugin import Plugin
from silbo.plugins.plugins import PluginReport, PluginRow, Plugins
from silbo.plugins.scope import PluginScope
from silbo.plugins.view import PluginView
from silbo.policy import Budget, Policy
from silbo.protocols import Publisher, Subscription

__version__ = "0.1.0"

__all__ = [
    "FIRST",
    "LAST",
    "AsyncEventDispatcher",
    "Attempt",
    "Backoff",
    "Bridge",
    "Budget",
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
    "FoundPlugin",
    "Health",
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
    "Plugin",
    "PluginReport",
    "PluginRow",
    "PluginScope",
    "PluginView",
    "Plugins",
    "Policy",
    "Portal",
    "Publisher",
    "Publishing",
    "Quota",
    "Refusal",
    "Registration",
    "Relay",
    "RelayedBatch",
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
    "in_thread",
    "find_plugins",
    "name_of",
    "on",
    "receive",
    "run_sync",
    "set_header",
]
