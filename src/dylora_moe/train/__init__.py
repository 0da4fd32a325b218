"""Training: `run.train` builds five things, then fits."""
