"""What `import dpo_fast` offers from Python, and what the commands call: training, evaluation, generation, pairs."""
