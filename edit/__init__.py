"""The recovered box steers an editor: overlay, LoRA on the diffusion transformer, scores. To come."""
