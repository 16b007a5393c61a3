"""The `r1-cluster` command, one file per subcommand."""
