"""A run on a machine of Google Cloud: recipe -> job, and what its container does. Imports no torch, and Google's
clients only where they are used.
"""
