"""What third-party packages need to build and run here: see README.md."""
