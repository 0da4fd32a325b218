"""Folders that are made once and kept in the user's cache: converted bases, prepared data."""
