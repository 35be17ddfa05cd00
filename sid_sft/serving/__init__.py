"""From a checkpoint to what an inference server needs."""
