"""Everything a run needs around training: its folder, processes, devices, files, signals and metrics."""
