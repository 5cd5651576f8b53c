"""What a run stands on: devices, checkpoints, reports."""
