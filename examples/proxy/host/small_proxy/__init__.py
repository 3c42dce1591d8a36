"""A small HTTP proxy. Its extension points are in small_proxy.events: all that a plugin has to know of it."""
