"""What the `saeql` command can do: a function a command, which imports what it needs when it is called."""
