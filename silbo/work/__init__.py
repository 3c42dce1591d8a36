"""Units of work: one scope of a container, the events that its handlers collect, the messages that it holds back."""
