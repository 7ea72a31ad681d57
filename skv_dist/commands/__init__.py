"""The installed commands: argument parsing and the order of things; what they do lives in the other packages."""
