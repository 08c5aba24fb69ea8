"""Command lines: the command `scaledistill` (`command`) and a module for each subcommand."""
