"""Text to batches: each file one step, from a raw row to the tensors of a training step."""
