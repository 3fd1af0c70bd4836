"""What a run stands on: its folder, processes, devices and files."""
