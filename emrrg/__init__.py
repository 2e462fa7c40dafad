"""Radiology reports from chest X-rays: vision Mamba, Partial LoRA, a Llama with hybrid layers.

``emrrg.load("runs/x")`` returns a trained model whose ``generate([["image.png"]])`` writes reports.
"""
