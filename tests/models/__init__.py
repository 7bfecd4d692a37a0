"""What patches or builds whole models: PEFT, norms, LoRALinear."""
