"""Supervised fine-tuning: examples, prompts, methods and the training run."""
