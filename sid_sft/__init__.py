"""Supervised fine-tuning of causal language models on semantic IDs: the rooms behind sft.py, data.py and evaluate.py."""
