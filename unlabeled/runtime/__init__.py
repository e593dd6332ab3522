"""What every command needs of the operating system: signals, locks, files, processes."""
