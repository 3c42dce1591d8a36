"""From received bytes to a dispatch, then an acknowledgement, a retry or a dead letter."""
