"""Training: fill the feature cache, train the decoder, save and resume exactly."""
