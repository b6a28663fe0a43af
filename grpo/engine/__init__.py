"""encode, sample, score: the network and everything that touches its tensors."""
