"""Quality in training loops of others: the loss, validation metrics, option files."""
