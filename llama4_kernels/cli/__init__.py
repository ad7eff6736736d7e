"""The command line: options in main, what each command does in the module of its name."""
