"""What a model file is and says, without parsing its tensors or running any of it; no torch."""
