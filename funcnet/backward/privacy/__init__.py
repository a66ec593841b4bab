"""Private training: clipped and noised gradients, sampling, and the accountant."""
