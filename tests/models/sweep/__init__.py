"""Stock PEFT against patched, over Transformers' architectures: `python -m tests.models.sweep`."""
