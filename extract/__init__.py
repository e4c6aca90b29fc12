"""One forward pass of a vision-language model over (picture, instruction), its hidden states written to a store."""
