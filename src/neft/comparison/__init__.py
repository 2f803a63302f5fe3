"""Many runs side by side, under one rule: methods, learning rates, seeds and tasks."""
