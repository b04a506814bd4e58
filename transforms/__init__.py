"""What we decide: pure functions and small state machines; no engine, no client, no clock."""
