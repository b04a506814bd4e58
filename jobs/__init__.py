"""With what: entry points of the jobs and their settings; the only readers of the environment."""
