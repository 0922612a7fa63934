"""Puts this directory on the import path (pytest does so for a conftest.py's directory), so that tests find `toys`."""
