"""Plans: what a layout takes of memory, network and time, without running it."""
