"""The demonstration: the main job from text to a talking model, through the public command alone (`make demo`)."""
