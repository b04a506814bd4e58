"""HTTP in: the webhook receiver."""
