"""The callbacks: when to measure, what to log, what to change; one file each."""
