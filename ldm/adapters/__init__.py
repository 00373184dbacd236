"""Small files that change a model: LoRA and its relatives, merged into the weights, and embeddings of new words."""
