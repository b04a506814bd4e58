"""The embedded stack: real servers as supervised child processes, and the `fanfare` command."""
