"""What runs a model: Hugging Face modules filled from any checkpoint, layer by layer."""
