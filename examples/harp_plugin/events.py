"""Two of HARP's events as silbo's names: from the name a type checker knows the class."""

from harp_apps.proxy.events import EVENT_FILTER_PROXY_REQUEST, EVENT_FILTER_PROXY_RESPONSE, ProxyFilterEvent

from silbo import EventName

REQUEST = EventName(EVENT_FILTER_PROXY_REQUEST, ProxyFilterEvent)
RESPONSE = EventName(EVENT_FILTER_PROXY_RESPONSE, ProxyFilterEvent)
