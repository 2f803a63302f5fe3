"""Groups of commands, and what all commands share; nothing heavy is imported before one runs."""
