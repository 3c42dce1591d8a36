"""Units of work: one scope of a container, the events that its handlers collect, the messages that wait for its end."""
