"""Models, data and configurations to try the callbacks on; not part of the installed package."""
