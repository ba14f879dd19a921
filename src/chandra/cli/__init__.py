"""The `chandra` command."""
